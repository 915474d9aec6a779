"""The oldest `transformers` this code supports, checked before anything else is imported.

The code also travels with checkpoints, to machines where pip never checked its requirements.
"""

import re

import transformers

OLDEST = (5, 4)  # as in setup.cfg

if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < OLDEST:
    raise ImportError(
        f"This checkpoint's code needs transformers {OLDEST[0]}.{OLDEST[1]} or newer; found "
        f"{transformers.__version__}. Run: pip install -U transformers. Without "
        "trust_remote_code=True, transformers' own AST reads the checkpoint."
    )
