"""Answer planning requests over HTTP with any method of the harness.

    python -m itp.serve --policy_model P --wm_model W --method foresight --fixed_k 1

POST /plan decides on one state; POST /generate_policy and /perception take the published form; /health says how it is.
Needs the extra ``itp[serve]``.  SIGTERM ends it: requests under way are finished first.
"""

from __future__ import annotations

import asyncio

from itp.config import parse_settings
from itp.errors import UserError
from itp.program import run_main
from itp.serve.settings import ServeSettings, check_service


def main() -> None:
    settings = parse_settings(ServeSettings, prog="python -m itp.serve", description=__doc__)
    check_service(settings)
    try:
        from itp.serve.server import serve
    except ImportError as error:
        raise UserError(f"the server needs {error.name}; pip install 'itp[serve]'") from error
    asyncio.run(serve(settings))


if __name__ == "__main__":
    run_main(main)
