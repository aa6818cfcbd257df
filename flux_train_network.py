"""The command line under the script name that existing FLUX.1 LoRA training commands use.

`accelerate launch flux_train_network.py --flags...`, `python flux_train_network.py --flags...` and
`python -m trainer --flags...` do the same.
"""

from __future__ import annotations

import sys

from trainer.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
