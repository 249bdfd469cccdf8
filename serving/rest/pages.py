"""The pages for people, the explorer and the API's own: HTML files beside this one."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Request, Response


class Page:
    """An HTML file; it shows nothing of the models without the routes that it asks."""

    def __init__(self, name: str) -> None:
        self._content = Path(__file__).with_name(name).read_bytes()
        self._headers = {
            "content-security-policy": _policy(self._content.decode()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

    async def show(self, request: Request) -> Response:
        """Answers with the page."""
        return Response(self._content, headers=self._headers, media_type="text/html")


def _policy(page: str) -> str:
    """A policy that lets the page run its own script and style, and ask its own server."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [hashlib.sha256(content.encode()).digest() for content in contents]
        allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
        rules.append(f"{tag}-src {allowed}")
    return "; ".join([*rules, "form-action 'none'", "frame-ancestors 'none'"])
