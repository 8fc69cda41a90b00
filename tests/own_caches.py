"""Runs an entry as on machines that each have a disk of their own for the cache:

torchrun --nproc-per-node=2 tests/own_caches.py train/lora.py data.cache=FOLDER/{rank} ...
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    entry = importlib.import_module(sys.argv[1].removesuffix(".py").replace("/", "."))
    entry.main([word.replace("{rank}", os.environ["RANK"]) for word in sys.argv[2:]])
