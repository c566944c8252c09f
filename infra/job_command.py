"""From `extract IMAGES=... STORE=...`, as typed behind make, to the command that a job of a cluster runs.

The words are make's own (`make -n`), so a job runs what the same line would run here. What cannot work in another
machine is refused before anything is sent.
"""

import difflib
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from infra.console import UserError

PYTHON = ".venv/bin/python"  # of the Makefile
READY = ".venv/.ready"
_PLACES = ("IMAGES", "STORE", "TO", "RUN", "RUNS", "PROBES", "OUT", "HEAD", "WEIGHTS", "TEACHER", "BLOCKS")
_DEFAULT_STORE = "data/stores/digits"
_LISTS = ("RUNS", "PROBES")
_NO_PLACE = {
    "IMAGES": r"digits",
    "WEIGHTS": r"random:\d+",
    "TEACHER": r"(?!run:).*",
    "BLOCKS": r"[\d,\s-]*",
}
_NOT_IN_A_JOB = {
    "RAY_ADDRESS": "it says where the job goes: type it beside CMD, make submit RAY_ADDRESS=http://HOST:8265 CMD=...",
    "NO_RAY": "a job runs on the cluster that it is submitted to",
}
_MACHINERY = {"PYTHON", "READY", "MAKEFILE_LIST", "MAKEFLAGS", "MAKE", "SHELL", "CMD", "JOB"}
_MAKE_S = 60
# Up to the @: also where the password holds what an address cannot, such as a slash.
_USER_INFO = re.compile(r"://([^/\s]*@|[^/@\s\[]+:(?!\d*([/,]|$))\S*@)")
_SIGNATURE = re.compile(
    r"((?:[?&]|%3f|%26)(?:x-amz-[a-z-]+|x-goog-[a-z-]+|awsaccesskeyid|googleaccessid|signature|sig|[a-z_-]*token"
    r"|key|api_?key|secret|password)(?:=|%3d))[^&\s'\"]+",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target of the Makefile that may be submitted.

    Attributes:
        must_have: Variables whose defaults are folders below whatever machine the job gets.
        in_driver: The work is done by the command itself and not by workers that it asks of Ray, so it needs a core.
    """

    must_have: tuple[str, ...]
    in_driver: bool = False


TARGETS: Mapping[str, Target] = {
    "extract": Target(must_have=("STORE",)),
    "train": Target(must_have=("STORE", "RUN")),
    "raptor": Target(must_have=("STORE", "RUN")),
    "probe": Target(must_have=("OUT",), in_driver=True),
    "verify": Target(must_have=("STORE",), in_driver=True),
    "copy": Target(must_have=("STORE", "TO"), in_driver=True),
    "convert": Target(must_have=("STORE", "TO"), in_driver=True),
    "phases": Target(must_have=("STORE", "OUT"), in_driver=True),
    "report": Target(must_have=("STORE", "OUT"), in_driver=True),
    "table": Target(must_have=("RUNS", "PROBES", "OUT"), in_driver=True),
}


@dataclass(frozen=True, kw_only=True)
class JobCommand:
    """One command for a cluster, checked.

    Attributes:
        target: Of the Makefile.
        variables: As typed.
        words: Behind the interpreter: -m pipeline extract --images ...
        warnings: What may go wrong there, for the person to know.
    """

    target: str
    variables: Mapping[str, str]
    words: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        typed = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([self.target, *typed])

    def entrypoint(self, python: str) -> str:
        """The line that a shell of the cluster runs."""
        return shlex.join([python, *self.words])

    @property
    def name(self) -> str:
        """What it is about, in few characters: the last part of its run's or store's place."""
        place = next((self.variables[name] for name in ("RUN", "OUT", "TO", "STORE") if self.variables.get(name)), "")
        parts = [part for part in place.rstrip("/").split("/")[-2:] if part]
        kept = parts if parts and parts[-1] in ("train", "val") else parts[-1:]
        return re.sub(r"[^a-z0-9]+", "-", f"{self.target}-{'-'.join(kept)}".lower()).strip("-")[:48]

    @property
    def uses_s3(self) -> bool:
        return any("s3://" in word for word in self.words)


def parse_command(typed: str, *, makefile: Path) -> JobCommand:
    """Check what was typed as CMD.

    Args:
        typed: A target and its variables, such as "extract IMAGES=s3://b/images STORE=s3://b/acts".
        makefile: Of this checkout.

    Raises:
        UserError: Lists everything that is wrong with it.
    """
    if not makefile.exists():
        raise UserError(f"there is no Makefile at {makefile}; make submit works in the checkout of the project")
    target, variables, problems = _split(typed)
    words: tuple[str, ...] = ()
    if not problems:
        taken, problems = _known(target, variables, makefile)
        words = _make_words(target, taken, makefile)
        problems += _secret_problems(words, taken)
        problems += _place_problems(target, words)
    if problems:
        raise UserError(_masked("\n  ".join([f"CMD={shlex.quote(typed)} cannot be submitted:", *problems])))
    warnings = [
        f"{name}={place}: every node of the cluster must see this folder (a shared file system); else use s3://"
        for name, place in _places(words)
        if "://" not in place
    ]
    return JobCommand(target=target, variables=variables, words=words, warnings=tuple(warnings))


def _split(typed: str) -> tuple[str, dict[str, str], list[str]]:
    """Target, variables, and what is no such thing."""
    try:
        words = shlex.split(typed)
    except ValueError as error:
        return "", {}, [f"the quotes do not match ({error}); expected TARGET NAME=value ..."]
    words = words[1:] if words[:1] == ["make"] else words
    if not words:
        return "", {}, [f'nothing is given; expected one of {", ".join(TARGETS)}, such as CMD="extract STORE=s3://..."']
    target, *rest = words
    problems = []
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        problems.append(f"{target!r} is no target for a cluster{hint}. There are {', '.join(TARGETS)}")
    variables: dict[str, str] = {}
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            problems.append(f"{word!r} is no variable; expected NAME=value, with quotes around blanks: NAME='a b'")
        elif name in variables:
            problems.append(f"{name} is given twice: {variables[name]!r} and {value!r}")
        elif not value.isprintable():
            problems.append(f"{name}={value!r} holds a line break or another character that cannot be typed")
        else:
            variables[name] = value
    return target, variables, problems


def _known(target: str, variables: Mapping[str, str], makefile: Path) -> tuple[dict[str, str], list[str]]:
    """The variables that make takes for this target, and what is wrong with the others."""
    problems = []
    taken = {}
    known = sorted(set(re.findall(r"\b[A-Z][A-Z0-9_]*\b", makefile.read_text())) - _MACHINERY)
    for name, value in variables.items():
        if name in _NOT_IN_A_JOB:
            problems.append(f"{name}={value}: {_NOT_IN_A_JOB[name]}")
        elif name in known and _is_used(target, name, makefile):
            taken[name] = value
        else:
            near = [other for other in difflib.get_close_matches(name, known) if _is_used(target, other, makefile)]
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{name}={value}: make {target} takes no {name}{hint}")
    return taken, problems


def _place_problems(target: str, words: Sequence[str]) -> list[str]:
    found = _places(words)
    lacks = [name for name in TARGETS[target].must_have if name not in _given(words)]
    problems = [
        f"{name} must be given: by default it is a folder below data/ of whichever machine the job runs on. Expected "
        "s3://bucket/prefix, or the full path of a folder that all nodes share"
        for name in lacks
    ]
    return problems + [problem for name, place in found if (problem := _place_problem(name, place))]


def _given(words: Sequence[str]) -> dict[str, str]:
    """Values of places by their variables, wherever they come from: CMD, the environment, local.mk, ARGS."""
    given = {name: value for flag, value in pairwise(words) for name in _PLACES if flag == f"--{name.lower()}"}
    if words[2] in ("copy", "convert"):  # by position; make fills in a STORE that is not given
        given |= {name: value for name, value in zip(("STORE", "TO"), words[3:5]) if value and value != _DEFAULT_STORE}
    return given


def _places(words: Sequence[str]) -> list[tuple[str, str]]:
    """Every place that is named, by its variable."""
    found = []
    for name, value in _given(words).items():
        for part in value.split(",") if name in _LISTS else [value]:
            if part.strip() and not re.fullmatch(_NO_PLACE.get(name, r"(?!)"), part.strip()):
                found.append((name, part.strip().removeprefix("run:")))
    return found


def _secret_problems(words: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Addresses that hold a secret, wherever in the command they are and wherever they come from."""
    found = list(variables.items())
    typed = set(variables.values()) | set(shlex.split(variables.get("ARGS", "")))
    for before, word in pairwise(("", *words)):
        if word not in typed:  # it is from the environment or from local.mk
            option = word.partition("=")[0] if word.startswith("--") else before
            found.append((option[2:].upper().replace("-", "_") if option.startswith("--") else "an address", word))
    problems = []
    for name, text in found:
        if _USER_INFO.search(text):
            problems.append(f"{name}: the address holds a password, and everybody who sees the dashboard would see it")
        if "://" in text and _SIGNATURE.search(text):
            problems.append(
                f"{name}: the address is signed, and everybody who sees the dashboard could use it. Expected one "
                "without, such as s3://bucket/prefix, and machines that have a role or keys of their own"
            )
    return problems


def _masked(text: str) -> str:
    """Without what `_secret_problems` finds: what is refused may be printed into a log too."""
    return _SIGNATURE.sub(r"\1...", _USER_INFO.sub("://...@", text))


def _place_problem(name: str, place: str) -> str:
    if "://" in place or os.path.isabs(place):
        return ""
    here = os.path.abspath(os.path.expanduser(place))
    return (
        f"{name}={place} is a path of this folder, and a job has another one. Expected s3://bucket/prefix, or a full "
        f"path that all nodes share, such as {here}"
    )


def _is_used(target: str, name: str, makefile: Path) -> bool:
    """Whether the target's command changes with a variable."""
    return _make_line(target, {name: "1"}, makefile) != _make_line(target, {name: ""}, makefile)


def _make_words(target: str, variables: Mapping[str, str], makefile: Path) -> tuple[str, ...]:
    line = _make_line(target, variables, makefile)
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(
            f"make {target} would run a line that cannot be taken apart ({error}): {_masked(line)}"
        ) from error
    if words[:2] != [PYTHON, "-m"] or len(words) < 4:
        raise UserError(
            f"make {target} would run {_masked(line) or 'nothing'}, which a cluster cannot. Expected {PYTHON} -m ...: "
            f"take out of local.mk what sets PYTHON, or makes {target} another target"
        )
    return tuple(words[1:])


def _make_line(target: str, variables: Mapping[str, str], makefile: Path) -> str:
    """What make would run; `$` stands for itself."""
    typed = {"RAY_ADDRESS": "", "NO_RAY": "", "ARGS": "", **variables}
    settings = [f"{name}={value.replace('$', '$$')}" for name, value in typed.items()]
    # What the make that runs us was given (CMD=, ARGS=) is not for this one.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"
    }
    command = ["make", "-n", "--no-print-directory", "-f", makefile.name, "-o", READY, target, *settings]
    done = subprocess.run(
        command, cwd=makefile.parent, env=environment, capture_output=True, text=True, timeout=_MAKE_S, check=False
    )
    if done.returncode:
        raise UserError(f"make -n {target} fails: {done.stderr.strip() or done.stdout.strip()}")
    return _one_line(done.stdout)


def _one_line(said: str) -> str:
    return " ".join(said.replace("\\\n", " ").splitlines()).strip()


def endpoint_warning(environment: Mapping[str, str], address: str, words: Sequence[str]) -> str:
    """Empty, or why the cluster may not find the S3 server of this machine."""
    endpoint = environment.get("AWS_ENDPOINT_URL", "")
    given = [word for flag, word in pairwise(words) if flag == "--endpoint-url"]
    own = [url for url in (*given, endpoint) if is_loopback(url)]
    if not own or is_loopback(address):
        return ""
    return (
        f"the S3 endpoint {own[0]} means this machine here, and each node itself there; give one that all nodes reach"
    )


def is_loopback(url: str) -> bool:
    """Whether a URL means the machine that reads it."""
    return re.match(r"https?://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", url) is not None
