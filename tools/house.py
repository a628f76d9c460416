"""The house as its imports draw it: `python tools/house.py [--write]`.

Reads every import of every module of `segkit/`, also those within functions and under `TYPE_CHECKING`, and compares them
with the table of floors in CONTRIBUTING.md. Prints what breaks the rules, then the drawing; `--write` puts the drawing
into CONTRIBUTING.md, between the lines that mark its place."""
import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT/"CONTRIBUTING.md"
ROW = re.compile(r"^\|\s*(\d+)\s*\|\s*`(\w+)`\s*\|([^|]*)\|", re.M)
MARKS = "<!-- house: made by tools/house.py -->", "<!-- end of the house -->"


class Arrow(NamedTuple):
    "One import: which module takes which name from which module"
    source: str  # `package.module`
    target: str  # `package.module`, or `package`
    name: str  # name that is imported, or ""
    line: int


def plan(text=None):
    "Floor of each package, and the packages of its own floor that it may import"
    rows = ROW.findall(PLAN.read_text(encoding="utf-8") if text is None else text)
    floors = {package: int(floor) for floor, package, _ in rows}
    beside = {package: set(re.findall(r"`(\w+)`", names)) for _, package, names in rows}
    return floors, beside


def modules(root=ROOT/"segkit"):
    "Name `package.module` -> file, for all modules in packages"
    return {f"{file.parent.name}.{file.stem}": file for file in sorted(root.glob("*/*.py")) if file.stem != "__init__"}


def resolved(node, module):
    "Full name of the module that an `from ... import` names, without `segkit.`; None for another library's"
    if not node.level: return node.module[len("segkit."):] if (node.module or "").startswith("segkit.") else None
    package = module.split(".")[0]
    base = [package] if node.level == 1 else []
    return ".".join([*base, *(node.module.split(".") if node.module else [])])


def arrows(files):
    "Every import of a module of segkit by another one"
    known = set(files)
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("segkit."): yield Arrow(module, alias.name[len("segkit."):], "", node.lineno)
            if isinstance(node, ast.ImportFrom) and (target := resolved(node, module)) is not None:
                for alias in node.names:
                    inner = f"{target}.{alias.name}".lstrip(".")  # `from . import module` names a module
                    if not target or inner in known: yield Arrow(module, inner, "", node.lineno)
                    else: yield Arrow(module, target, alias.name, node.lineno)


def breaches(found, floors, beside):
    "Arrows that run up or across the house, and private names that leave their module"
    for arrow in found:
        here, there = arrow.source.split(".")[0], arrow.target.split(".")[0]
        where = f"{arrow.source}:{arrow.line} imports {arrow.target}"
        if not {here, there} <= set(floors): yield f"{where}: no floor in CONTRIBUTING.md for {here} or {there}"
        elif here != there and floors[there] >= floors[here] and there not in beside[here]:
            yield f"{where}: {here} (floor {floors[here]}) may not import {there} (floor {floors[there]})"
        private = arrow.name if arrow.name.startswith("_") else ""
        private = private or next((part for part in arrow.target.split(".") if part.startswith("_")), "")
        if private: yield f"{where}: {private} is private"


def circle(found):
    "A circle of modules, or None"
    graph = {}
    for arrow in found: graph.setdefault(arrow.source, set()).add(arrow.target)
    try: tuple(TopologicalSorter(graph).static_order())
    except CycleError as error: return error.args[1]
    return None


def effects(file):
    "Statements at the top of a module that change what other libraries define"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    foreign = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
               for alias in node.names if isinstance(node, ast.Import) or not node.level}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in foreign:
                yield f"{file.parent.name}.{file.stem}:{node.lineno} sets {ast.unparse(target)}"
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and (name := ast.unparse(call.func)).split(".")[0] in foreign and name.split(".")[-1] in (
                "filterwarnings", "simplefilter", "setattr", "set_num_threads", "manual_seed", "use", "update"):
            yield f"{file.parent.name}.{file.stem}:{node.lineno} calls {name}"


def reduced(pairs):
    "Arrows between packages without those that a longer way replaces"
    direct = {a: {b for x, b in pairs if x == a} for a in {a for a, _ in pairs}}
    def reach(a): return direct.get(a, set()) | {c for b in direct.get(a, set()) for c in reach(b)}
    return sorted((a, b) for a, b in pairs if not any(b in reach(c) for c in direct[a] - {b}))


def drawing(found, floors):
    "The packages as a Mermaid chart, the highest floor on top; an arrow goes from who imports to who is imported"
    pairs = {(a.source.split(".")[0], a.target.split(".")[0]) for a in found}
    pairs = reduced({(a, b) for a, b in pairs if a != b})
    lines = ["```mermaid", "flowchart TD"]
    for floor in sorted(set(floors.values()), reverse=True):
        names = [name for name in floors if floors[name] == floor]
        lines += [f"  subgraph floor{floor}[floor {floor}]", *(f"    {name}" for name in names), "  end"]
    return "\n".join([*lines, *(f"  {a} --> {b}" for a, b in pairs), "```"])


def main(options):
    files = modules()
    found, (floors, beside) = list(arrows(files)), plan()
    wrong = [*breaches(found, floors, beside)]
    if loop := circle(found): wrong.append("a circle: " + " -> ".join(loop))
    print("\n".join(wrong) or f"{len(files)} modules, {len(found)} imports: every arrow runs down")
    chart, (begin, end) = drawing(found, floors), MARKS
    text = PLAN.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    if "--write" in options: PLAN.write_text(f"{before}{begin}\n{chart}\n{end}{after}", encoding="utf-8")
    else: print(chart)
    sys.exit(bool(wrong))


if __name__ == "__main__": main(sys.argv[1:])
