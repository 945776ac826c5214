"""The server's description as one page that fetches nothing: what ``GET /docs`` answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f6;padding:.8rem;overflow:auto;font-size:13px;white-space:pre-wrap}"
    "table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
    "@media(prefers-color-scheme:dark){body{background:#16161a;color:#ddd}pre{background:#222}}"
)


def page(description: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: each operation with its body and answers, then the schemas."""
    info = description["info"]
    parts = [f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"]
    parts.append(f"<p>{escape(info.get('description', ''))}</p>")
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {})
            parts += [_body(kind, x) for kind, x in body.items()]
            rows = [
                f"<tr><td>{escape(status)}</td><td>{escape(answer.get('description', ''))}</td>"
                f"<td>{_of(answer)}</td></tr>"
                for status, answer in operation["responses"].items()
            ]
            parts.append(f"<table>{''.join(rows)}</table>")
    for name, schema in description.get("components", {}).get("schemas", {}).items():
        parts.append(f'<h3 id="{escape(name)}">{escape(name)}</h3>{_json(schema)}')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _body(kind: str, content: Mapping[str, Any]) -> str:
    """An example, where there is one, and the schema below it, folded."""
    example = f"<pre>{escape(json.dumps(content['example']))}</pre>" if "example" in content else ""
    schema = f"<details><summary>its schema</summary>{_json(content['schema'])}</details>"
    return f"<p>Body, {escape(kind)}:</p>{example}{schema}"


def _json(x: object) -> str:
    return f"<pre>{escape(json.dumps(x, indent=1))}</pre>"


def _of(answer: Mapping[str, Any]) -> str:
    """Links to the schemas that an answer names."""
    text = json.dumps(answer.get("content", {}))
    names = dict.fromkeys(part.partition('"')[0] for part in text.split("#/components/schemas/")[1:])
    return ", ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names)
