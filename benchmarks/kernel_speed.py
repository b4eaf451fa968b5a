"""De-quantise, quantise and multiply against bitsandbytes and dense products. A few minutes on two cores.

Not called kernels.py: this folder comes first on the path, and a package of that name is looked for by others.
"""

import tempfile
from pathlib import Path

from common import options, run_json, write_result

given = options(__doc__)
with tempfile.TemporaryDirectory() as name:
    words = ["bench", "kernels", *given.words]
    result = run_json(words, Path(name))
    shown = [{key: value for key, value in case.items() if not isinstance(value, dict)} for case in result["cases"]]
    write_result(f"kernels{given.suffix}", {"command": "smidgen " + " ".join(words), **result}, Path(name), shown)
