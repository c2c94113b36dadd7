"""What importing costs, and what it does not touch."""

import json
import os
import subprocess
import sys
import time

EXTRAS = ("matplotlib", "pydantic", "rich", "sklearn", "tensorboard", "timm", "torchvision", "typer")


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_alone_loads_no_torch():
    assert python("import json, sys, dualprune; print(json.dumps('torch' in sys.modules))") is False


def test_all_public_names_pull_no_extra_and_touch_no_cuda():
    loaded, cuda = python(
        "import json, sys, dualprune\n"
        "for name in dualprune.__all__: getattr(dualprune, name)\n"
        "import torch\n"
        "print(json.dumps([sorted({m.partition('.')[0] for m in sys.modules}), torch.cuda.is_initialized()]))"
    )
    assert "torch" in loaded and not set(loaded) & set(EXTRAS)
    assert cuda is False


def test_import_without_torchs_own_is_under_50_ms():
    # with bytecode, which pip makes when it installs, also where the variable below keeps Python from writing it
    seconds = python(
        "import json, sys, time, torch\n"
        "def load():\n"
        "    for name in [m for m in sys.modules if m.partition('.')[0] == 'dualprune']: del sys.modules[name]\n"
        "    start = time.process_time()\n"  # of this process: other work on the machine does not count
        "    import dualprune\n"
        "    dualprune.attach, dualprune.SLR, dualprune.Filter\n"
        "    return time.process_time() - start\n"
        "print(json.dumps([load() for _ in range(5)]))",
        PYTHONDONTWRITEBYTECODE="",
    )
    assert min(seconds) < 0.05


def test_help_takes_less_than_a_second_and_a_half():
    def once():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dualprune", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 1.5
