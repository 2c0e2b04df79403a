"""Asks for known vulnerabilities in the pinned releases (`make audit`), and says so where nobody could be asked.

python .ci/audit.py [another list of pins] [-- further options of pip-audit]

pip-audit itself ends with "No known vulnerabilities found" where its service knows none of the releases, and with the
status of a finding where the service cannot be reached. Exit status here: 0 without findings, or where nothing could be
asked; 1 with a finding that .ci/advisories.txt does not list.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PIP_AUDIT = ROOT / ".cache" / "audit" / "bin" / "pip-audit"
OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner=off", "--timeout=10", "--format=json", "--desc=off")
_FIRST = ("torch", "transformers", "ray")  # asked alone first: what knows none of these is not asked 120 times


def ask(pins: Sequence[str], options: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Return pip-audit's entry for each of these pins, none if it could not ask, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, answer = Path(folder, "pins.txt"), Path(folder, "answer.json")
        requirements.write_text("\n".join(pins))
        command = [str(PIP_AUDIT), "--requirement", str(requirements), "--output", str(answer), *OPTIONS, *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [], str(error)
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return (json.loads(answer.read_text())["dependencies"] if answer.is_file() else []), said


def verdict(found: Sequence[Mapping[str, Any]], accepted: Mapping[str, str]) -> tuple[list[str], int]:
    """Return what to print of pip-audit's entries, and the exit status. accepted: what was decided, by advisory."""
    asked = [entry for entry in found if "skip_reason" not in entry]
    unknown = [entry["name"] for entry in found if "skip_reason" in entry]
    if not asked:
        return [f"audit: NOT DONE: the advisory service knows none of the {len(unknown)} releases asked for"], 0
    lines, status = [], 0
    for entry in asked:
        for advisory in entry["vulns"]:
            names = [advisory["id"], *advisory.get("aliases", ())]
            decided = next((accepted[name] for name in names if name in accepted), None)
            status = status if decided else 1
            mended = ", ".join(advisory.get("fix_versions", ())) or "no release"
            known_as = f"{names[0]} ({', '.join(names[1:])})" if names[1:] else names[0]
            note = decided or "not decided: raise the pin, or say in .ci/advisories.txt why it stays"
            lines.append(f"audit: {entry['name']} {entry['version']}: {known_as}, mended in {mended}: {note}")
    num_found = len(lines)
    lines.append(f"audit: {len(asked)} of {len(found)} pinned releases asked about, {num_found} advisories")
    if unknown:
        lines.append(f"audit: not known to the service: {' '.join(unknown)}")
    return lines, status


def read_pins(path: Path) -> list[str]:
    """Return the lines of a file that are no comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def read_accepted(path: Path) -> dict[str, str]:
    """Return what was decided about each advisory: its name, then a colon and the reason, a line each."""
    parts = (line.partition(":") for line in read_pins(path))
    return {name.strip(): reason.strip() for name, _, reason in parts}


def main(arguments: Sequence[str]) -> int:
    """Ask, print and return the exit status."""
    own, options = arguments, ()
    if "--" in arguments:
        at = arguments.index("--")
        own, options = arguments[:at], arguments[at + 1 :]
    pins = read_pins(Path(own[0]) if own else ROOT / "constraints.txt")
    first = [pin for pin in pins if pin.partition("=")[0] in _FIRST] or pins[:1]
    for asked in (first, pins):
        found, said = ask(asked, options)
        lines, status = verdict(found, read_accepted(ROOT / ".ci" / "advisories.txt"))
        if not found:
            lines, status = [f"audit: NOT DONE: the advisory service cannot be asked: {said}"], 0
        if "NOT DONE" in lines[0]:
            break
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
