"""HTML pages from the templates beside this file: dataset.html and evaluation.html.

A page loads nothing from elsewhere. Every value put into a template is escaped.
"""
import os

import jinja2  # comes with torch

FOLDER = os.path.dirname(os.path.abspath(__file__))


def number(value):
    """1234567 as 1,234,567."""
    return f'{value:,}'


def share(part, whole):
    """The part as a percentage of the whole."""
    if not whole:
        return '–'
    return f'{part / whole:.1%}'


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters |= {'number': number, 'share': share}


def render(template, **values):
    """The page that the template makes of the values, as bytes."""
    text = ENVIRONMENT.get_template(template).render(values)
    # The name of a file need not be valid Unicode.
    return text.encode('utf-8', 'xmlcharrefreplace')
