"""Which images belong to a row, and where its text has a place for each: paths, a datasets column, content parts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_dist.config.schema import DataConfig
from plop_dist.data.rows import kind_of
from plop_dist.errors import DataError, MissingExtraError, first_line

Row = Mapping[str, Any]
_SOURCES = ("image", "path", "url")  # of a content part; a url may name a file


def has_images(rows: Sequence[Row], data: DataConfig) -> bool:
    """Tell whether any row has an image: in data.images_field, or as a content part of data.messages_field."""
    if data.images_field is not None:
        return True
    return data.messages_field is not None and any(map(_image_parts, (_messages(row, data) for row in rows)))


def refuse_images(rows: Sequence[Row], data: DataConfig) -> None:
    """Raise DataError for rows with images where texts alone are read."""
    if has_images(rows, data):
        raise DataError(
            f"{data.path}: rows have images, which are read by scoring and by train.method=sft with backend "
            "transformers or deepspeed (ZeRO) alone; leave images out here (data.images_field=null)."
        )


def images_of(row: Row, number: int, data: DataConfig) -> list[Any]:
    """Return the images of a row in order, as PIL images in RGB: those of content parts, and the column's.

    Parts without a source of their own take those of data.images_field one by one. number: the row's, for messages.
    Raises DataError for an image that is missing or none, and where parts and images are not the same number;
    MissingExtraError without Pillow.
    """
    column = _column(row, number, data)
    parts = _image_parts(_messages(row, data))
    if not parts:
        return [_opened(image, number, data) for image in column]
    sources = [_source(part) for part in parts]
    num_open = sum(source is None for source in sources)
    if num_open != len(column):
        raise DataError(
            f"{data.path}: row {number}: column '{data.messages_field}' has {num_open} images without a path, and "
            f"data.images_field gives {len(column)}; give one for each, or a path in each part."
        )
    given = iter(column)
    return [_opened(next(given) if source is None else source, number, data) for source in sources]


def with_placeholders(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Return messages as a processor's chat template takes them: contents as parts, images without their sources.

    Where no part is an image, the images come first in the first message of the user, as TRL puts them.
    """
    placed = bool(_image_parts(messages))
    found = []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        parts = [{"type": "image"} if _is_image(part) else part for part in parts]
        if not placed and message.get("role") == "user":
            parts = [{"type": "image"}] * num_images + parts
            placed = True
        found.append({**message, "content": parts})
    return found


def content_parts(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the content parts of messages in order; a content that is one text has none."""
    contents = [message.get("content") for message in messages]
    return [part for content in contents if isinstance(content, list) for part in content]


def kind_of_part(part: Any) -> str:
    """Return the type that a content part says it has."""
    return str(part.get("type")) if isinstance(part, Mapping) else ""


def joined_texts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages with contents of text parts alone as one text, which every chat template takes."""
    return [{**message, "content": _joined(message.get("content"))} for message in messages]


def _joined(content: Any) -> Any:
    is_text = (
        isinstance(content, list)
        and content
        and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    )
    return "".join(part["text"] for part in content) if is_text else content


def _messages(row: Row, data: DataConfig) -> Sequence[Mapping[str, Any]]:
    value = None if data.messages_field is None else row.get(data.messages_field)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _image_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [part for part in content_parts(messages) if _is_image(part)]


def _is_image(part: Any) -> bool:
    return kind_of_part(part) in ("image", "image_url")


def _source(part: Mapping[str, Any]) -> Any:
    found = next((part[key] for key in _SOURCES if part.get(key) is not None), part.get("image_url"))
    return found.get("url") if isinstance(found, Mapping) and "url" in found else found


def _column(row: Row, number: int, data: DataConfig) -> list[Any]:
    if data.images_field is None:
        return []
    if data.images_field not in row:
        raise DataError(
            f"{data.path}: row {number} has no column '{data.images_field}' (data.images_field); it has "
            f"{', '.join(map(str, row)) or 'none'}."
        )
    value = row[data.images_field]
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _opened(image: Any, number: int, data: DataConfig) -> Any:
    """Return an image that is one already, the bytes or the path of one (a datasets column), or a path."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingExtraError("images need the package 'pillow': pip install 'plop-dist[vision]'") from error
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    where = f"{data.path}: row {number}: the image"
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if isinstance(image, bytes):
            return Image.open(io.BytesIO(image)).convert("RGB")
        if not isinstance(image, str):
            raise DataError(f"{where} is {kind_of(image)}, expected a path or an image.")
        if "://" in image:
            raise DataError(f"{where} is at {image[:80]}, and nothing is fetched; put it into a file beside the rows.")
        with Image.open(Path(data.path).parent / image) as opened:
            return opened.convert("RGB")
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{where} '{image}' does not exist; paths are looked for in the folder of {data.path}."
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be read: {first_line(error)}.") from error
