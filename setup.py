"""Build script: dynamic metadata comes from `settings.ini`, static metadata from `pyproject.toml`."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
_ini = ConfigParser(delimiters=["="])
_ini.read(here/"settings.ini", encoding="utf-8")
cfg = _ini["DEFAULT"]
_status = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("examples", "tiff", "annotations")}
extras["examples"] += extras["tiff"] + extras["annotations"]  # the pages read and write such files

setup(
    version=cfg["version"],
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    license=cfg["license"],
    classifiers=[f"Development Status :: {_status[int(cfg['status'])-1]}",
                 f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}",
                 "Programming Language :: Python :: 3 :: Only", "Typing :: Typed",
                 "Topic :: Scientific/Engineering :: Image Processing"],
    packages=find_packages(include=["segkit", "segkit.*"]),
    package_data={"": ["py.typed", "*.pyi", "*.tsv"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"dev": cfg["dev_requirements"].split() + extras["examples"]},
    entry_points={"nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    zip_safe=False,
)
