"""What the value of a key may be: numbers within bounds, names in the registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from plop_dist.errors import ConfigError, suggest
from plop_dist.registry import Kind, names


def _refuse_truth(value: Any) -> Any:
    # pydantic would read true as 1.
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


_NUMBER = BeforeValidator(_refuse_truth)

# The upper bounds refuse nothing that a machine can hold, and keep the rest from where it would fail: tokenizers and
# collectives count in 32 bits, random generators and JSON readers in 64.
Count = Annotated[int, Field(ge=1, le=2**31 - 1), _NUMBER]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1), _NUMBER]
CountOfSeveral = Annotated[int, Field(ge=2, le=2**20), _NUMBER]
CountOfFew = Annotated[int, Field(ge=1, le=2**10), _NUMBER]
CountOfFewSeveral = Annotated[int, Field(ge=2, le=2**10), _NUMBER]
HeldOutRows = Annotated[int, Field(ge=8, le=2**20), _NUMBER]
Parameters = Annotated[int, Field(ge=1, le=2**63 - 1), _NUMBER]
AxisSize = Annotated[int, Field(ge=1, le=2**20), _NUMBER]
Rank = Annotated[int, Field(ge=1, le=2**20), _NUMBER]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1), _NUMBER]
NumpySeed = Annotated[int, Field(ge=0, le=2**32 - 1), _NUMBER]
Real = Annotated[float, _NUMBER]
Positive = Annotated[float, Field(gt=0), _NUMBER]
PositiveOrZero = Annotated[float, Field(ge=0), _NUMBER]
Amount = Annotated[float, Field(gt=0, lt=1e9), _NUMBER]
Share = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Seconds = Annotated[float, Field(gt=0, le=1e8), _NUMBER]


def _refuse_long_paths(value: str) -> str:
    # Asking whether such a path exists raises an error of the system's own. Ids of a hub are shorter still.
    if len(value.encode()) > 4095 or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError("a path of at most 4,095 bytes, each part of it of at most 255")
    return value


Location = Annotated[str, AfterValidator(_refuse_long_paths)]


def _named_method(value: dict[str, Any]) -> dict[str, Any]:
    method = value.get("quant_method")
    if not isinstance(method, str) or not method:
        raise ConfigError(
            "quant_method is missing; say which kind it is, e.g. {quant_method: bitsandbytes, load_in_4bit: true}."
        )
    return value


Quantization = Annotated[dict[str, Any], AfterValidator(_named_method)]


_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)?", re.IGNORECASE)


def _memory_by_device(value: Any) -> Any:
    # pydantic has an error of its own for each kind of key and of value, under names that are no keys.
    if not isinstance(value, dict):
        raise ValueError("sizes by device, e.g. {0: 20GB, cpu: 60GB}")
    found: dict[int | str, int | str] = {}
    for device, size in value.items():
        number = _device_number(device)
        if number is None and device not in ("cpu", "disk", "mps"):
            raise ValueError("the numbers of GPUs, cpu and disk, e.g. {0: 20GB, cpu: 60GB}")
        if isinstance(size, bool) or not isinstance(size, int | str) or not _SIZE.fullmatch(str(size)):
            raise ValueError("a size or a number of bytes for each device, e.g. {0: 20GB, cpu: 60GB}")
        found[device if number is None else number] = size
    return found


def _device_map(value: Any) -> Any:
    is_name = value in ("auto", "balanced", "balanced_low_0", "sequential")
    is_mapping = isinstance(value, dict) and all(
        isinstance(path, str) and (_device_number(device) is not None or isinstance(device, str))
        for path, device in value.items()
    )
    if value is not None and not is_mapping and not (isinstance(value, str) and is_name):
        raise ValueError(
            "auto, balanced, balanced_low_0, sequential, or devices by path, e.g. {model: 0, lm_head: cpu}"
        )
    return value


def _device_number(device: Any) -> int | None:
    if isinstance(device, bool) or not isinstance(device, int | str):
        return None
    return int(device) if str(device).isascii() and str(device).isdecimal() and len(str(device)) < 4 else None


MaxMemory = Annotated[dict[int | str, int | str], BeforeValidator(_memory_by_device)]
DeviceMap = Annotated[str | dict[str, int | str] | None, BeforeValidator(_device_map)]


def _number_or_auto(value: Any) -> Any:
    # pydantic has an error of its own for each of the two, under names that are no keys.
    try:
        if value == "auto" or (not isinstance(value, bool) and 0 <= float(value) < 1e9):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("a number from 0 to 1e9, or 'auto'")


_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


@dataclass(frozen=True)
class _ShortNames:
    """Annotates a key whose values have shorter names, which mean the same; editors are told both."""

    meaning: Mapping[str, str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._whole, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        inner = handler(schema)
        return {**inner, "enum": [*inner["enum"], *self.meaning]}

    def _whole(self, value: Any) -> Any:
        return self.meaning.get(value, value) if isinstance(value, str) else value


Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], _ShortNames(_SHORT_DTYPES)]
AmountOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)]


@dataclass(frozen=True)
class NameOf:
    """Annotates a key of type str: its value must be a name of this kind, of this package or of another one.

    also: what else it may be.
    """

    kind: Kind
    also: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": [*self.also, *names(self.kind)]}

    def _check(self, value: str) -> str:
        # Our own first: they need no search through all installed packages.
        if value not in self.also and value not in self.kind.own and value not in names(self.kind):
            known = (*self.also, *names(self.kind))
            raise ConfigError(f"unknown {self.kind.word} '{value}'. {suggest(value, known)}")
        return value


@dataclass(frozen=True)
class NameOrFunction:
    """Annotates a key of type str that is a name of this kind or a user's own module:function.

    Which of the two a value is, and whether it is one, is judged with its whole list; editors are told both forms.
    """

    kind: Kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return handler(source)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        text = handler(schema)
        return {"anyOf": [{**text, "enum": list(names(self.kind))}, {**text, "pattern": "^(?!builtin:).+:.+$"}]}
