"""Every check of `tools/` must fail when what it guards is broken: seen here on a small project that is broken in many ways."""
import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]

def markdown(id, source): return dict(cell_type="markdown", id=id, metadata={}, source=source)

def code(id, source, *outputs):
    return dict(cell_type="code", id=id, metadata={}, source=source, execution_count=None, outputs=list(outputs))

def result(**data):
    return dict(output_type="execute_result", execution_count=None, metadata={}, data={k.replace("_", "/"): v for k, v in data.items()})

TITLE = markdown("title", "# Sum\n\n> Two numbers")
ADD = '#| export\ndef add(\n    a: int, # First number\n    b: int = 1, # Second number\n) -> int: # Sum of `a` and `b`\n    "Add"\n    return a + b'
LESSON = [TITLE, code("default-exp", "#| default_exp core.add"), markdown("why", "Here is `add`, and $x^2$."), code("add", ADD),
          code("use", "add(1, 2)", result(text_plain="3"))]
INDEX = [markdown("title", "# segkit\n\n> Small"), markdown("pages", "The pages:\n\n<!-- pages -->")]

class Project:
    "A project of two notebooks, with the tools of this one"
    def __init__(self, folder):
        self.root = folder
        for name in ("tools", "docs"): shutil.copytree(root/name, folder/name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root/"pyproject.toml", folder)
        (folder/"segkit"/"core").mkdir(parents=True)
        for package in ("segkit", "segkit/core"): (folder/package/"__init__.py").write_text('__version__ = "0.1.0"\n')
        self.write("index", INDEX)
        self.write("core/00_add", LESSON)
        self.call("nbdev-clean")
        self.call("nbdev-export")
        self.tool("docs.py", "readme")

    def write(self, name, cells):
        path = self.root/"nbs"/f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
        path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
        return path

    def call(self, *command):
        done = subprocess.run([Path(sys.executable).parent/command[0], *command[1:]], cwd=self.root, text=True, capture_output=True)
        return done.returncode, done.stdout + done.stderr

    def tool(self, name, *arguments): return self.call("python", f"tools/{name}", *arguments)

@pytest.fixture
def project(tmp_path): return Project(tmp_path)

def test_all_is_well(project):
    for tool in (["check_nbs.py"], ["check_fresh.py"], ["docs.py", "readme", "--check"]): assert project.tool(*tool) == (0, "")
    assert "[Sum](nbs/core/00_add.ipynb)" in (project.root/"README.md").read_text()

FAULTS = {
    "core/01_twice": (LESSON, "default_exp core.add is already used by 00_add.ipynb"),
    "core/02_elsewhere": ([TITLE, code("default-exp", "#| default_exp heads.add")], "default_exp is heads.add, the place says core.elsewhere"),
    "core/03_nowhere": ([TITLE, code("add", ADD)], "there is no default_exp"),
    "core/unnumbered": ([TITLE], "not NN_name.ipynb"),
    "core/00_again": ([TITLE], "has the number of"),
    "core/04_no_title": ([markdown("title", "Sum")], "the first cell is not"),
    "core/05_id": ([TITLE, markdown("3f2a91bc", "x")], "#3f2a91bc: the id is not readable"),
    "core/06_uuid": ([TITLE, markdown("a1b2c3d4-1111-4222-8333-123456789abc", "x")], "the id is not readable"),
    "core/07_same_id": ([TITLE, TITLE], "not a valid notebook"),
    "core/08_heading": ([TITLE, markdown("why", "## Why\n\nBecause.")], "#why: a heading stands in a cell of its own"),
    "core/09_conflict": ([TITLE, markdown("lost", "`<<<<<<< HEAD`"), code("left", "a = 1\n=======\na = 2")], "#left: a merge conflict is left"),
    "core/10_error": ([TITLE, code("run", "1/0", dict(output_type="error", ename="ZeroDivisionError", evalue="", traceback=[]))],
                      "#run: stored error output: ZeroDivisionError"),
    "core/11_picture": ([TITLE, code("draw", "draw()", result(image_png=base64.b64encode(bytes(41_000)).decode()))], "#draw: a picture of 41 KB"),
    "core/12_large": ([TITLE, markdown("long", "word "*110_000)], "537 KiB; the limit is 512"),
    "core/13_address": ([TITLE, code("run", "f", result(text_plain="<function f at 0x7f3c5a1b2c80>"))], "#run: the stored output has a memory address"),
    "core/14_path": ([TITLE, code("run", "f", dict(output_type="stream", name="stdout", text="/home/me/x.png"))], "#run: the stored output has a path"),
    "core/15_time": ([TITLE, code("run", "f", result(text_html="<td>00:03</td>"))], "#run: the stored output has a time: '00:03'"),
    "core/16_seconds": ([TITLE, code("run", "f", result(text_markdown="trained in 3.2 s"))], "#run: the stored output has a time: '3.2 s'"),
    "core/17_source": ([TITLE, code("run", "open('/home/me/x.png')")], "#run: the source names a path of one machine"),
    "core/18_long": ([TITLE, code("default-exp", "#| default_exp core.long"), code("long", "#| export\n" + "\n".join(f"a{i} = {i}" for i in range(31)))],
                     "#long: warning: an exported cell of 31 lines"),
}

def test_structure(project):
    for name, (cells, _) in FAULTS.items(): project.write(name, cells)
    (project.root/"nbs/core/19_broken.ipynb").write_text('{"cells": [\n<<<<<<< HEAD')
    status, said = project.tool("check_nbs.py")
    assert status == 1 and "19_broken.ipynb: not a valid notebook" in said and "00_add" not in said.replace("used by 00_add", "").replace("number of 00_add", "")
    for name, (_, told) in FAULTS.items():
        lines = [line for line in said.splitlines() if line.startswith(f"nbs/{name}.ipynb")]
        head, _, rest = told.partition("warning: ")
        assert any((told in line) or (rest and f"warning: {head}{rest}" in line) for line in lines), (name, lines)
    project.write("core/18_long", FAULTS["core/18_long"][0])
    assert project.tool("check_nbs.py", "nbs/core/18_long.ipynb")[0] == 0  # a warning does not fail
    assert project.tool("check_nbs.py", "--split", "nbs/core/08_heading.ipynb")[0] == 0
    assert '"why-head"' in (project.root/"nbs/core/08_heading.ipynb").read_text()

def test_fresh(project):
    module = project.root/"segkit/core/add.py"
    (project.root/"segkit/core/gone.py").write_text(module.read_text())
    module.write_text(module.read_text().replace("a + b", "a - b"))
    project.write("core/01_more", [TITLE, code("default-exp", "#| default_exp core.more"), code("add", ADD) | {"execution_count": 3}])
    status, said = project.tool("check_fresh.py")
    assert status == 1
    assert sorted(line.split(":")[0] for line in said.splitlines()) == [
        "nbs/core/01_more.ipynb is not clean", "segkit/_modidx.py is not what its notebook exports",
        "segkit/core/add.py is not what its notebook exports", "segkit/core/gone.py is stale", "segkit/core/more.py is missing"]
    assert "a - b" in module.read_text()  # nothing was changed

def test_readme(project):
    (project.root/"README.md").write_text("segkit")
    status, said = project.tool("docs.py", "readme", "--check")
    assert status == 1 and "run `make readme`" in said

def test_site(project):
    status, said = project.tool("docs.py", "site")
    assert (status, said.strip()) == (0, "2 pages: _docs/index.html")
    page = (project.root/"_docs/core/add.html").read_text()
    for part in ('id="segkit.core.add.add"', 'href="#segkit.core.add.add"', "Second number", "Sum of ", r"\(x^2\)"): assert part in page
    assert 'href="core/add.html"' in (project.root/"_docs/index.html").read_text()

def test_site_with_a_broken_link(project):
    project.write("core/01_more", [TITLE, markdown("why", "See [nothing](../core/07_nothing.ipynb).")])
    status, said = project.tool("docs.py", "site")
    assert status == 1 and "core/more.ipynb" in said and "nothing.ipynb" in said

def test_all_checks(project):
    "One command runs them; a fault in one does not hide the others; files that a notebook leaves are told"
    project.write("core/01_leave", [TITLE, code("leave", "from pathlib import Path\nPath('left.txt').write_text('x');")])
    project.write("core/02_wrong", [TITLE, code("wrong", "import os\nassert 1 + 1 == 3")])
    for command in (["init", "-q"], ["add", "."]): subprocess.run(["git", *command], cwd=project.root, check=True)
    status, said = project.tool("check.py", "notebooks", "lint", "run")
    assert status == 1 and said.strip().endswith("failed: lint, run, tree")
    for told in ("`os` imported but unused", "AssertionError", "02_wrong.ipynb", "?? nbs/core/left.txt"): assert told in said
    assert project.tool("check.py", "nonsense")[0] == 1
