"""The README's transcripts, typed into a shell as they stand there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.api.conftest import start_node
from tests.cluster import ROOT, Cluster, ServeProcess

README = (ROOT / "README.md").read_text(encoding="utf-8")
ANY_NODE = re.compile(r"127\.0\.0\.1:908[123]")
CHAPTERS = ("A running cluster in a minute", "HTTP")
PLAY_MAX_S = 60


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[ServeProcess]:
    """A node whose revisions begin at 1."""
    with Cluster(tmp_path) as cluster:
        yield start_node(cluster)
        print(cluster.describe())


def chapter(name: str) -> str:
    """The text of a chapter up to the next one."""
    return README.split(f"\n## {name}\n")[1].split("\n## ")[0]


def transcript(text: str) -> list[tuple[str, str]]:
    """All commands of the code blocks in `text`, and what each prints."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            # A quote that is open goes on in the next line.
            count = next(n for n in range(1, len(lines) + 1) if is_whole("\n".join(lines[:n])))
            found.append(("\n".join(lines[:count]), "\n".join(lines[count:])))
    return found


def is_whole(command: str) -> bool:
    return subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0


def test_transcripts(fresh: ServeProcess) -> None:
    """One shell and one cluster from the first chapter to the last, as for who types along, so that
    variables last and revisions go on; one node stands for all of them."""
    here = f"{fresh.host}:{fresh.port}"
    chapters = [transcript(chapter(name)) for name in CHAPTERS]
    assert all(chapters)
    steps = list(chain.from_iterable(chapters))
    script = "\n".join(f"{command}\nprintf '\\0'" for command, _ in steps)
    done = subprocess.run(
        ["bash", "-c", ANY_NODE.sub(here, script)],
        capture_output=True,
        text=True,
        timeout=PLAY_MAX_S,
    )
    outputs = done.stdout.replace("\r", "").split("\0")[:-1]
    assert len(outputs) == len(steps), done.stderr
    for (command, expected), output in zip(steps, outputs, strict=True):
        pattern = ".*".join(re.escape(part) for part in expected.rstrip("\n").split("…"))
        assert re.fullmatch(pattern, output.rstrip("\n")), (command, expected, output)
