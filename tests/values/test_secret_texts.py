"""Secrets of the usual shapes are found in texts, alone and among other lines; what only sounds like one stays."""

from __future__ import annotations

import base64
import json
import time

import pytest
import yaml

from plop_dist.report.redact import redact
from plop_dist.values.secret_texts import REDACTED, secret_part, without_secrets

LETTERS = "Zk3Qx9Lm7Wp2Rt5Vb8Nc4Hd6Jf1"
TOKENS = (
    f"hf_{LETTERS}abcdef",
    f"sk-proj-{LETTERS}",
    f"ghp_{LETTERS}abcdefgh",
    f"gho_{LETTERS}abcdefgh",
    f"ghs_{LETTERS}abcdefgh",
    f"github_pat_{LETTERS}_{LETTERS}",
    f"glpat-{LETTERS}",
    f"xoxb-12345-{LETTERS}",
    f"xoxp-{LETTERS}",
    f"nvapi-{LETTERS}",
    f"AIza{LETTERS}12345678",
    "AKIAZK3QX9LM7WP2RT5V",
    f"gsk_{LETTERS}",
    f"npm_{LETTERS}abcdefgh",
    f"eyJhbGciOiJIUzI1NiJ9.{LETTERS}.{LETTERS}",
    f"Bearer {LETTERS}",
    f"bearer {LETTERS}",
    f"Basic {base64.b64encode(f'me:{LETTERS}'.encode()).decode()}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{LETTERS}\n{LETTERS}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{LETTERS}\ncut off",
)
URLS = (
    f"https://{LETTERS}@host/rows.jsonl",
    f"https://me:{LETTERS}@host/x",
    f"HTTPS://me:{LETTERS}@host:80/x?y=1",
    f"s3://{LETTERS}@bucket/x",
    f"https://me:pa/{LETTERS}@host/x",
    f"https:/me:{LETTERS}@host/x",
    f"//{LETTERS}@host/x",
    f"simplecache::https://{LETTERS}@h/x",
    f"me:{LETTERS}@host:8265",
    f"me:{LETTERS}@host.org/x",
    f"https://%75ser:{LETTERS}@host/x",
    *(
        f"https://host/rows?a=1&{name}={LETTERS}"
        for name in (
            "token",
            "sig",
            "signature",
            "Signature",
            "X-Amz-Signature",
            "X-Amz-Credential",
            "X-Amz-Security-Token",
            "access_token",
            "key",
            "password",
            "api_key",
            "apikey",
            "apiKey",
            "client_secret",
            "X-Goog-Signature",
            "AWSAccessKeyId",
            "auth",
            "%74oken",
            "TOKEN",
        )
    ),
    f"https://host/rows#access_token={LETTERS}",
    f"rows.jsonl?token={LETTERS}",
    f"https://host/rows;token={LETTERS}",
)
PLAIN = (
    "Qwen/Qwen2.5-0.5B",
    "hf://datasets/org/name@main/rows.jsonl",
    "https://host/rows.jsonl?page=2&download=true",
    "/data/user@host/rows.jsonl",
    "https://medium.com/@user/text",
    "s3://bucket/a/b",
    "http://127.0.0.1:8265",
    "ray://head:10001",
    "my.module:reward",
    "builtin:number",
    "sk-learn",
    "hf_model",
    "Basic arithmetic tasks",
    "a_bearer of news",
    "tokens.jsonl",
    "runs/token",
    "model.layers.0.mlp.up_proj",
    "git@host",
    "*.layers.1.*",
    "C:/rows.jsonl",
    "num_tokens: 5, tokens_per_second=3, eos_token: null",
    "https://host/x?keyword=a&monkey=b",
    "hub_token: ${oc.env:HF_TOKEN}",
    "token=$HF_TOKEN",
    "password: null",
)


@pytest.mark.parametrize("text", [*TOKENS, *URLS])
def test_what_is_secret_is_taken_out_and_told(text: str) -> None:
    for around in ("{}", "before {} after", "a: 1\nb: {}\nc: 2", "x='{}'"):
        cleaned = without_secrets(around.format(text))
        assert LETTERS not in cleaned
        assert REDACTED in cleaned
        assert without_secrets(cleaned) == cleaned
    part = secret_part(text)
    assert part is not None
    assert LETTERS not in part


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_sounds_like_one_stays(text: str) -> None:
    assert without_secrets(text) == text
    assert secret_part(text) is None


@pytest.mark.parametrize(
    "name", ["token", "HF_TOKEN", "wandb_api_key", "password", "client-secret", "accessToken", "Authorization"]
)
@pytest.mark.parametrize("value", ["first second", "first\nsecond", "first: second,}&", 'fir"st second', "it's second"])
def test_a_named_secret_is_taken_out_whole_however_it_is_written(name: str, value: str) -> None:
    value = value.replace("first", LETTERS).replace("second", LETTERS[::-1]).replace("fir", LETTERS)
    texts = [
        yaml.safe_dump({"a": {name: value, "b": "stays"}}, width=20),
        yaml.dump({"a": [{name: value}], "b": "stays"}, default_style="|"),
        yaml.dump({name: value, "b": "stays"}, default_style=">"),
        json.dumps({name: value, "b": "stays"}),
        json.dumps({"text": json.dumps({name: value}), "b": "stays"}),
        json.dumps({name: value, "b": "stays"}, indent=1),
    ]
    for text in texts:
        cleaned = without_secrets(text)
        assert LETTERS not in cleaned, text
        assert LETTERS[::-1] not in cleaned, text
        assert "stays" in cleaned
    assert redact({"a": [{name: value}]}) == {"a": [{name: REDACTED}]}


@pytest.mark.parametrize(
    "text",
    [
        f"--hf-token {LETTERS}",
        f"--password '{LETTERS} {LETTERS}'",
        f"WANDB_API_KEY={LETTERS} plop-dist run",
        f'PASSWORD="a\n{LETTERS}" x',
        f"Authorization: token {LETTERS}",
        f"Authorization: Basic {LETTERS}",
        f"x-api-key: {LETTERS}",
        f"Cookie: a={LETTERS}; b={LETTERS}",
    ],
)
def test_secrets_of_commands_and_headers_are_taken_out(text: str) -> None:
    assert LETTERS not in without_secrets(text)


def test_a_template_may_name_columns_around_an_at_and_no_url_with_a_secret() -> None:
    assert secret_part("{user}:{name}@{host.x}", is_prose=True) is None
    assert secret_part("{q}?key={a}", is_prose=True) is None
    assert secret_part("see https://me:pw@host/x: {q}", is_prose=True) is not None


def test_long_texts_take_no_longer_per_character() -> None:
    for piece in (
        "a",
        "a.",
        "token ",
        "token: ",
        "://",
        "x:",
        "?a=",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        '"',
        "\\",
        " \n",
        "a:b@",
    ):
        started = time.process_time()
        without_secrets(piece * (50_000 // len(piece)))
        assert time.process_time() - started < 2, piece
