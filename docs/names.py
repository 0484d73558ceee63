"""Index of the names defined on the site, and the links to them from prose and from displayed code."""

import html
import os
import re

# Inline code that is not a link yet, links to files in Markdown and in HTML, Python code in a finished page, and the names in that code
SPAN = re.compile(r"(?<![`\[])(`+)(?!`)(.+?)(?<!`)\1(?![`\]])")
FILE_LINK = re.compile(r"\]\(([\w./-]+?)(?:\.ipynb)?\)")
HTML_LINK = re.compile(r'(?<=href=")([\w./-]+)\.ipynb(?=")')
CODE = re.compile(r'(<div class="language-python highlight">)(.*?)(</code></pre>)', re.S)
NAME = re.compile(r'(?<!<span class="o">\.</span>)<span class="(?:n|ne)">(\w+)</span>(?=(<span class="p">\()?)')


class Names:
    "Index of everything that the site's pages define"

    def __init__(self, root, source_url):
        self.root = root
        self.source_url = source_url
        self.defined = {}  # Qualified name -> {defining page: anchor}
        self.methods = {}  # Name -> qualified names of the methods with this name
        self.arguments = set()  # Names of parameters and fields
        self.pages = {}  # Module, notebook path or notebook stem -> page

    def add_page(self, page, *names):
        for name in names:
            self.pages[name] = page

    def add(self, page, definition):
        "Add a definition and its members"
        owner, _, name = definition.name.rpartition(".")
        if owner and definition.name not in self.defined:
            self.methods.setdefault(name, []).append(definition.name)
        self.defined.setdefault(definition.name, {})[page] = definition.anchor
        self.arguments |= {argument.name.strip("*") for argument in definition.fields + definition.parameters}
        for member in definition.members:
            self.add(page, member)

    def place(self, name, page):
        "Return (page, anchor) of a name used on `page`, or None if the name is unknown or ambiguous"
        is_sure = name.endswith("()") or "." in name
        name = name.removesuffix("()").removeprefix("lmnotes.")
        module, _, last = name.rpartition(".")
        if target := self.pages.get(f"lmnotes.{module}"):
            anchor = self.defined.get(last, {}).get(target)
            return anchor and (target, anchor)
        methods = self.methods.get(name, [])
        here = [name] if page in self.defined.get(name, ()) else []
        here = here or [other for other in methods if page in self.defined[other]]
        if here:
            return (page, self.defined[here[0]][page]) if len(here) == 1 else None
        if name in self.arguments and not is_sure:
            return None
        places = list(self.defined.get(name, {}).items())
        return places[0] if len(places) == 1 and not methods else None

    def link(self, code, page):
        "Return the link target of the name or path `code` on `page`, or an empty string"
        target = self.pages.get(code.removesuffix(".ipynb"))
        if target:
            return "" if target == page else relative(target, page)
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", code) and (found := self.place(code, page)):
            return f"{relative(found[0], page) if found[0] != page else ''}#{found[1]}"
        path = code.partition("::")[0]
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|\w+\.(py|ini|txt)", path) and (self.root / path).exists():
            return f"{self.source_url}/{path.rstrip('/')}"
        return ""

    def in_prose(self, markdown, page):
        "Return Markdown whose names and paths in backticks are links"

        def linked(span):
            target = self.link(span[2].strip(), page)
            return f"[{span[0]}]({target})" if target else span[0]

        def to_page(link):
            folder = os.path.dirname(page)
            paths = [os.path.normpath(f"{base}/{link[1]}") for base in (f"nbs/{folder}", ".", "nbs", f"docs/{folder}")]
            return next((relative(self.pages[path], page) for path in paths if path in self.pages), None)

        lines = []
        fence = ""
        for line in markdown.split("\n"):
            mark = re.match(r"\s*(```+|~~~+)", line)
            if mark and (not fence or mark[1] == fence):
                fence = "" if fence else mark[1]
            elif not fence and not line.startswith(("    ", "#")):
                line = SPAN.sub(linked, line)
                line = FILE_LINK.sub(lambda link: f"]({target})" if (target := to_page(link)) else link[0], line)
                line = HTML_LINK.sub(lambda link: (to_page(link) or link[0]).replace(".md", ".html"), line)
            lines.append(line)
        return "\n".join(lines)

    def in_code(self, page_html, page):
        "Return a finished page whose classes and called functions in Python code are links"

        def linked(name):
            if not name[2] and not name[1][0].isupper():
                return name[0]
            found = self.place(name[1] + "()", page) if name[1] in self.defined else None
            if not found:
                return name[0]
            path = relative(found[0], page).replace(".md", ".html") if found[0] != page else ""
            return f'<a class="name" href="{html.escape(path)}#{html.escape(found[1])}">{name[0]}</a>'

        return CODE.sub(lambda block: block[1] + NAME.sub(linked, block[2]) + block[3], page_html)


def relative(target, page):
    "Return the path from one page to another"
    return os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")
