"""What the documentation site shows that is no page in docs/.

README, CONTRIBUTING, CHANGELOG, pictures of bench/results, and the gallery's notebooks with the outputs that are stored in
them: a notebook becomes a page like any other, so that its links are checked and it loads nothing from elsewhere.

Links between files of the repository are right on a plain viewer. Here those to pages lead to the pages, those to pictures
to copies, and those to code are the code's name. A link to what isn't there ends the build.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root → what they are in the site."""
NOTEBOOKS = sorted((ROOT / "docs" / "gallery").glob("*.ipynb"))
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
NAMED = re.compile(r"\bdocs/(\w+\.md)\b")
"""How docstrings name a page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    for notebook in NOTEBOOKS:
        text, outputs = markdown_of(notebook)
        files.append(File.generated(config, f"gallery/{notebook.stem}.md", content=text))
        for name, picture in outputs.items():
            files.append(File.generated(config, f"gallery/{name}", content=picture))
    return files


def markdown_of(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's cells and outputs as Markdown, and the pictures among them by their names."""
    text, resources = MarkdownExporter().from_filename(str(notebook), {"unique_key": notebook.stem})
    return text.replace("![png](", "![What this code draws]("), resources["outputs"]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links of a file in the repository to where they lead in the site."""
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation"]
    source = {page: name for name, page in PAGES.items()}.get(here, f"docs/{here}")
    return LINK.sub(lambda link: led(link, source, here, files), markdown).replace(".ipynb)", ".md)")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the pages that docstrings name."""
    if not page.file.src_uri.startswith("api/"):
        return html

    def link(named: re.Match[str]) -> str:
        file = files.get_file_from_path(named[1])
        if file is None:
            raise PluginError(f"a docstring of {page.file.src_uri} names {named[0]}, which isn't there")
        return f'<a href="{file.url_relative_to(page.file)}">{named[0]}</a>'

    return NAMED.sub(link, html)


def led(link: re.Match[str], source: str, here: str, files: Files) -> str:
    """Return a link as text of the page ``here``, which is the file ``source`` of the repository."""
    mark, text, path, anchor = link.groups()
    if mark and files.get_file_from_path(f"{os.path.dirname(here)}/{path}"):
        return link[0]
    target = os.path.normpath(Path(source).parent / path).replace(os.sep, "/")
    if not (ROOT / target).exists():
        raise PluginError(f"{source} links to {path}, which isn't there")
    if target.startswith("bench/results/") and target.endswith(".png"):
        found = f"pictures/{Path(target).name}"
    elif target.startswith("docs/"):
        found = target.removeprefix("docs/")
    elif target in PAGES:
        found = PAGES[target]
    else:
        return text if "`" in text or "/" not in text else f"`{text}`"
    start = os.path.dirname(here) or "."
    return f"{mark}[{text}]({os.path.relpath(found, start).replace(os.sep, '/')}{anchor or ''})"
