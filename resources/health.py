"""`python -m resources.health URL`: a health check for containers without curl.

Exit status 0 if the address answers.
"""

import sys
import urllib.error
import urllib.request

SECONDS = 5


def answers(url: str) -> bool:
    """Whether an address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as response:  # noqa: S310 - the health check's own address
            return bool(response.status < 400)  # noqa: PLR2004 - HTTP: client errors begin there
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    if not answers(sys.argv[1]):
        raise SystemExit(1)
