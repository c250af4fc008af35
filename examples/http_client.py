"""Asks a running `graphhash serve` for recommendations; Python's standard library alone.

    graphhash serve out/bundle
    python examples/http_client.py http://127.0.0.1:8000 42 43

Ids are sent as numbers where they look like numbers; `--text` sends them as text.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a JSON body.

    Raises:
        SystemExit: the server refused the request, with its one-line reason, or cannot be reached.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code}: {json.load(error)['error']}") from None
    except urllib.error.URLError as error:
        raise SystemExit(f"no answer from {url}: {error.reason}") from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a running `graphhash serve` for recommendations.")
    parser.add_argument("server", help="such as http://127.0.0.1:8000")
    parser.add_argument("user_ids", nargs="+")
    parser.add_argument("-k", type=int, default=5, help="items per user")
    parser.add_argument("--text", action="store_true", help="send ids as text")
    options = parser.parse_args(arguments)

    def raw(word: str) -> int | str:
        return int(word) if not options.text and word.lstrip("-").isdecimal() else word

    users = [raw(word) for word in options.user_ids]
    answer = post(f"{options.server}/v1/recommend", {"user_ids": users, "k": options.k})
    for result in answer["results"]:
        note = "" if result["known"] else " (unknown to the model; the fallback answers)"
        items = ", ".join(f"{item['item_id']} ({item['score']:.3f})" for item in result["items"])
        print(f"{result['user_id']}{note}: {items}")


if __name__ == "__main__":
    main()
