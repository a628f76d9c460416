"""`pytest --quick` runs the files that answer soon and look at most: arrows, names, the numbers of SMP, saving."""
QUICK = {
    "test_config.py", "test_house.py", "test_hub.py", "test_models.py", "test_losses_table.py", "test_metrics_confusion.py",
    "test_inspect.py", "test_fuse.py", "test_data_blocks.py",
}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only the files that answer soon")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"): return
    left_out = [item for item in items if item.path.name not in QUICK]
    items[:] = [item for item in items if item.path.name in QUICK]
    config.hook.pytest_deselected(items=left_out)
