"""All checks, or those that are named: `python tools/check.py [notebooks fresh readme lint docs run tests quick]`.

`make check` and continuous integration run all but `quick`, which stands for the ones that answer in a few minutes:
structure, freshness, README, lint, and the quick part of pytest (`tests/conftest.py` says which). The tree may hold uncommitted work: each check looks at the files
as they are. A check that fails does not stop the others; the exit code is 1 when one failed."""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
CHECKS = {
    "notebooks": ("structure of the notebooks", [PYTHON, "tools/check_nbs.py"]),
    "fresh": ("modules are what the notebooks export, notebooks are clean", [PYTHON, "tools/check_fresh.py"]),
    "readme": ("README.md is what nbs/index.ipynb says", [PYTHON, "tools/docs.py", "readme", "--check"]),
    "lint": ("ruff", [PYTHON, "-m", "ruff", "check", "--output-format", "concise", "nbs", "tests", "tools", "docs", "setup.py"]),
    "docs": ("the site builds without warnings", [PYTHON, "tools/docs.py", "site"]),
    "run": ("every notebook runs", [PYTHON, "tools/run_nbs.py"]),
    "tests": ("pytest", [PYTHON, "-m", "pytest", "-n", "2", "--dist", "worksteal"]),  # last: its closing line ends a run that passes
}
CHECKS_OF_QUICK = ["notebooks", "fresh", "readme", "lint", "quick tests"]
QUICK_TESTS = ("the quick part of pytest", [PYTHON, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--quick"])

def tree():
    "What git says about the tree, or nothing without git"
    try: return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, text=True, capture_output=True).stdout
    except FileNotFoundError: return ""

def main(names):
    if "--help" in names: return print(__doc__)
    checks = CHECKS | {"quick tests": QUICK_TESTS}
    if "quick" in names: names = [*(n for n in names if n != "quick"), *CHECKS_OF_QUICK]
    if unknown := [n for n in names if n not in checks]: raise SystemExit(f"no check {', '.join(unknown)}\n\n{__doc__}")
    env = os.environ | {"PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    env.setdefault("OMP_NUM_THREADS", "1")  # two workers at a time: on two cores, more threads only wait for each other
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # and where a page asks for two, those that wait must not spin
    before, failed = tree(), []
    for name in names or CHECKS:
        what, command = checks[name]
        print(f"\n==> {name}: {what}", flush=True)
        start = time.monotonic()
        passed = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode == 0
        if not passed: failed.append(name)
        if not passed or "tests" not in name:
            print(f"{'ok' if passed else 'FAILED'} ({time.monotonic() - start:.0f} s)", flush=True)
    if tree() != before:
        print(f"the checks changed the tree; it was\n{before or '(clean)'}\nand is\n{tree()}")
        failed.append("tree")
    if failed: raise SystemExit(f"\nfailed: {', '.join(failed)}")

if __name__ == "__main__": main(sys.argv[1:])
