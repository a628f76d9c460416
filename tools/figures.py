"""How dense is the code? segkit's figures beside those of code that people like to read: `python tools/figures.py [folder]`.

A mirror, not a gate. A code line is one that is neither empty nor only a comment. The anchors' figures were measured in the
same way on their main branches in November 2026 and stand here as facts."""
import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[1]
ANCHORS = {  # measure -> fastcore, claudette, einops, timm (layers and utils), vit-pytorch, SMP
    "code lines": ("6.3k to 7.3k", ".7k", "2.3k", "12.2k", "12.7k", "11.8k"),
    "syntax nodes a line": ("9.6", "8.3", "6.9", "6.9", "8.8", "5.2"),
    "characters a line": ("52", "41", "37", "34", "34", ""),
    "lines over 120": ("6.4 %", "1.1 %", ".2 %", ".1 %", "2.0 %", ""),
    "lines over 140": ("1.6 %", ".7 %", "0 %", "0 %", ".9 %", ""),
    "function, median lines": ("4", "7", "4", "9", "9", ""),
    "function, p90 lines": ("12", "20", "31", "39", "34", ""),
    "exported cell, median lines": ("6", "8.5", "", "", "", ""),
    "exported cells over 25 lines": ("4 %", "6.5 %", "", "", "", ""),
    "tuple assignments / 100 lines": ("1.2", ".8", "0", ".2", ".9", ".1"),
    "conditional expressions / 100": ("4.1", "2.7", ".4", "1.4", "1.8", ".4"),
    "comprehensions / 100": ("4.3", "2.5", "2.0", ".5", ".7", ".5"),
    "nested comprehensions / 100": (".08", ".14", ".04", ".03", "", ""),
    "comments / 100": ("1.4", "1.8", "4.5", "6.4", "6.6", "3.4"),
}
NAMES = ("fastcore", "claudette", "einops", "timm", "vit-pytorch", "SMP")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Code:
    "What is counted in one module"
    def __init__(self, text):
        self.tree = ast.parse(text)
        self.nodes = [node for node in ast.walk(self.tree)]
        comments = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        alone = {t.start[0] for t in comments if not text.splitlines()[t.start[0] - 1][:t.start[1]].strip()}
        numbered = enumerate(text.splitlines(), 1)
        self.lines = [line for number, line in numbered if line.strip() and number not in alone]
        documented = self.parameter_lines()
        self.comments = [t for t in comments if t.start[0] not in documented and not t.string.startswith("# %%")]

    def functions(self): return [n for n in self.nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def parameter_lines(self):
        "Lines of signatures, whose comments document parameters"
        return {line for f in self.functions() for line in range(f.lineno, f.body[0].lineno)}

    def count(self, *kinds): return sum(isinstance(node, kinds) for node in self.nodes)

    def tuple_assignments(self):
        "Assignments of several things at once"
        assigns = [n for n in self.nodes if isinstance(n, ast.Assign)]
        return sum(isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple) for n in assigns)

    def nested(self):
        "Comprehensions that hold another one"
        outer = [n for n in self.nodes if isinstance(n, COMPREHENSIONS)]
        return sum(any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(n) if inner is not n) for n in outer)


def cell_lines(source):
    "Lines of an exported cell, without empty ones and directives"
    return len([line for line in source.splitlines() if line.strip() and not line.startswith("#|")])


def exported_cells(folder):
    "Lines of each exported cell of the notebooks below `folder`"
    for path in sorted(folder.rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.relative_to(folder).parts): continue
        for cell in read_nb(path).cells:
            if cell.cell_type == "code" and cell.source.startswith("#| export"): yield cell_lines(cell.source)


def figures(files, cells=()):
    "Measure -> value, for some modules and the exported cells of their notebooks"
    codes = [Code(file.read_text(encoding="utf-8")) for file in files]
    lines = [line for code in codes for line in code.lines]
    total = len(lines)
    lengths = sorted(f.end_lineno - f.lineno + 1 for code in codes for f in code.functions())
    def share(n): return f"{100*n/total:.1f} %"
    def per_100(n): return f"{100*n/total:.2g}"
    def all_of(method, *args): return sum(getattr(code, method)(*args) for code in codes)
    result = {
        "code lines": f"{total/1000:.1f}k",
        "syntax nodes a line": f"{sum(len(code.nodes) for code in codes)/total:.1f}",
        "characters a line": f"{statistics.mean(map(len, lines)):.0f}",
        "lines over 120": share(sum(len(line) > 120 for line in lines)),
        "lines over 140": share(sum(len(line) > 140 for line in lines)),
        "function, median lines": f"{statistics.median(lengths):.0f}",
        "function, p90 lines": f"{lengths[9*len(lengths)//10]}",
        "tuple assignments / 100 lines": per_100(all_of("tuple_assignments")),
        "conditional expressions / 100": per_100(all_of("count", ast.IfExp)),
        "comprehensions / 100": per_100(all_of("count", *COMPREHENSIONS)),
        "nested comprehensions / 100": per_100(all_of("nested")),
        "comments / 100": per_100(sum(len(code.comments) for code in codes)),
    }
    if cells:
        result["exported cell, median lines"] = f"{statistics.median(cells):g}"
        result["exported cells over 25 lines"] = f"{100*sum(n > 25 for n in cells)/len(cells):.0f} %"
    return result


def main(folder):
    folder = Path(folder)
    packages = {p.name: sorted(p.glob("*.py")) for p in sorted((folder/"segkit").iterdir()) if p.is_dir() and any(p.glob("*.py"))}
    whole = figures([f for files in packages.values() for f in files if f.stem != "__init__"], list(exported_cells(folder/"nbs")))
    print(f"{'':30}{'segkit':>10}" + "".join(f"{name:>14}" for name in NAMES))
    for measure, anchors in ANCHORS.items():
        print(f"{measure:30}{whole[measure]:>10}" + "".join(f"{value:>14}" for value in anchors))
    print(f"\n{'package':12}{'code lines':>12}{'nodes a line':>14}{'over 120':>10}")
    for name, files in packages.items():
        own = figures(files)
        print(f"{name:12}{own['code lines']:>12}{own['syntax nodes a line']:>14}{own['lines over 120']:>10}")


if __name__ == "__main__": main(sys.argv[1] if len(sys.argv) > 1 else ROOT)
