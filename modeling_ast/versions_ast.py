"""The oldest `transformers` that this code runs on, checked before anything else is imported.

The code also travels with checkpoints to machines where nobody ran pip for it.
"""

import re

import transformers

OLDEST = (5, 4)  # as in setup.cfg

if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < OLDEST:
    raise ImportError(
        f"This checkpoint's code needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, here is "
        f"{transformers.__version__}: pip install -U transformers. Without trust_remote_code=True, "
        "transformers' own AST reads the checkpoint."
    )
