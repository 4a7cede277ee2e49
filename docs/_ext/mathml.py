"""Formulas as MathML, which browsers render themselves: the pages need no script, font or network."""

from docutils import nodes
from latex2mathml.converter import convert


def _write(display):
    def visit(self, node):
        latex = node.astext()
        if display and "\\\\" in latex and "\\begin" not in latex:  # lines are rows of an aligned block
            latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
        markup = convert(latex, display="block" if display else "inline")
        self.body.append(f'<div class="math">{markup}</div>' if display else markup)
        raise nodes.SkipNode

    return visit


def setup(app):
    app.add_html_math_renderer("mathml", (_write(False), None), (_write(True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
