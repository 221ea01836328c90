"""Hooks of MkDocs: what the site shows beside the files in docs/, and a check of the finished site.

* README, changelog, contributing and the pages of benchmarks/ become pages of the site where they stand; nothing is
  copied.
* A link to any other file or folder of the repository leads to a page that shows it. The same link works on GitHub.
* The API reference has one page per package, in the order of layers that `tests/test_architecture.py` holds.
* Doctests in docstrings are shown as code.
* After the build every link, anchor and resource of the HTML is looked up. A page that loads something from elsewhere
  fails.

A warning ends the build, since `make docs` is strict.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("mkdocs.hooks.site")

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/methods/README.md": "benchmarks/methods/README.md",
}
"""Pages from outside docs/: path in the repository -> path in the site."""

IMAGES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".cff": "yaml"}
MAX_SHOWN_BYTES = 100_000
"""A folder with more than this is shown as a list of names."""

_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^(`{3,}).*?^\1`*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_config(config: Any, **_: Any) -> Any:
    """Add the API reference to the navigation, and doctests to what Markdown understands."""
    config.markdown_extensions.append(_Doctests())
    pages = [{name: f"reference/{name}.md"} for name in packages()]
    config.nav.append({"API reference": ["reference/index.md", *pages]})
    return config


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages and images from outside docs/, the files that pages link to, and the API reference."""
    sources = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    for target in sorted({target for source in sources for target in _targets(source)}):
        uri = site_path(target)
        if files.get_file_from_path(uri) is not None:
            continue
        if target.endswith(IMAGES):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
        else:
            shown = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, content=_source_page(target), inclusion=shown))
    for name, modules in packages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference_page(name, modules)))
    files.append(File.generated(config, "reference/index.md", content=_reference_index()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source = next((source for source, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")
    if not (ROOT / source).is_file():
        return markdown

    def to_site(match: re.Match[str]) -> str:
        target = _resolve(source, match[2])
        if not (ROOT / target).exists():
            return match[0]  # MkDocs reports it
        path = os.path.relpath(site_path(target), os.path.dirname(page.file.src_uri) or ".")
        return match[1] + path + (match[3] or "")

    return _outside_code(markdown, lambda text: _LINK.sub(to_site, text))


def on_post_build(config: Any, **_: Any) -> None:
    """Look up every link of the finished site."""
    site = Path(config.site_dir)
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for kind, url in page.urls:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if kind == "resource" and parts.scheme != "data":
                    LOG.warning("%s loads %s: the site must work offline", path.relative_to(site), url)
                continue
            if path.name == "404.html" or parts.path.startswith("/"):
                continue  # the one page with absolute links, since it stands for any address
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                LOG.warning("%s links to %s, which is not in the site", path.relative_to(site), url)
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                LOG.warning("%s links to %s, which has no such anchor", path.relative_to(site), url)
    LOG.info("Looked up %d links of %d pages", sum(len(page.urls) for page in pages.values()), len(pages))


def packages() -> dict[str, list[str]]:
    """The modules of each package (``{"core": ["sylva_ray.core.errors", ...]}``), the lowest layer first."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    layers: tuple[str, ...] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    )
    found: dict[str, list[str]] = {name: [] for name in layers}
    for path in sorted((ROOT / "sylva_ray").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "sylva_ray" and path.read_text().strip():
            found.setdefault(module.split(".")[1], []).append(module)
    return {name: modules for name, modules in found.items() if modules}


def site_path(target: str) -> str:
    """Where a file or folder of the repository is in the site: ``source/cluster.yaml.md`` for ``cluster.yaml``."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return target if target.endswith(IMAGES) else f"source/{target}.md"


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _resolve(source: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(source), unquote(link)))


def _targets(source: str) -> Iterator[str]:
    """The existing files and folders that a page links to."""
    found: list[str] = []

    def collect(text: str) -> str:
        found.extend(match[2] for match in _LINK.finditer(text))
        return text

    _outside_code((ROOT / source).read_text(), collect)
    for link in found:
        if (ROOT / (target := _resolve(source, link))).exists():
            yield target


def _source_page(target: str) -> str:
    path = ROOT / target
    if path.is_file():
        return f"# {target}\n\n{_block(path)}"
    names = subprocess.run(["git", "ls-files", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.splitlines()]
    shown = [path for path in paths if path.suffix in LANGUAGES]
    if not shown or sum(path.stat().st_size for path in shown) > MAX_SHOWN_BYTES:
        return f"# {target}/\n\n" + "\n".join(f"* `{path.relative_to(ROOT / target)}`" for path in paths)
    return f"# {target}/\n\n" + "\n\n".join(f"## {path.relative_to(ROOT / target)}\n\n{_block(path)}" for path in shown)


def _block(path: Path) -> str:
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text().rstrip()}\n````\n"


def _reference_page(name: str, modules: list[str]) -> str:
    return f"# {name}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"


def _reference_index() -> str:
    intro = "Packages in the order of their layers: a package imports itself and those above it in this list"
    lines = ["# API reference", "", f"{intro} ([architecture](../architecture.md)).", ""]
    for name, modules in packages().items():
        lines += [f"## [{name}]({name}.md)", ""]
        lines += [f"* [`{module.removeprefix('sylva_ray.')}`][{module}]: {_summary(module)}" for module in modules]
        lines += [""]
    return "\n".join(lines)


def _summary(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


class _Doctests(Extension):
    """A doctest (``>>>`` up to the next blank line) is a block of code; in Markdown alone it would be a quotation."""

    def extendMarkdown(self, md: Markdown) -> None:
        before_fences = 28  # and after the normalisation of white space
        md.preprocessors.register(_FenceDoctests(md), "doctests", before_fences)


class _FenceDoctests(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        fenced = doctest = False
        for line in [*lines, ""]:
            if line.lstrip().startswith("```"):
                fenced = not fenced
            if not fenced and not doctest and line.startswith(">>> "):
                doctest = True
                result.append("```pycon")
            elif doctest and not line.strip():
                doctest = False
                result.append("```")
            result.append(line)
        return result[:-1]


class _Page(HTMLParser):
    """The anchors of a page, and what it links to or loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.urls: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag == "a" and (url := values.get("href")):
            self.urls.append(("link", url))
        loads = tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect")
        if url := values.get("href") if loads else values.get("src"):
            self.urls.append(("resource", url))
