"""The forms beside this file, filled in: HTML pages and a model card.

A page loads nothing from elsewhere. What it shows is escaped.
"""
import os
import re

import jinja2  # comes with torch


def share(part, whole):
    """The part as a percentage of the whole."""
    return f'{part / whole:.1%}' if whole else '–'


def markdown(value):
    """The value, shown as it is."""
    return re.sub(r'([\\`*_\[\]<>&|~$#])', r'\\\1', str(value))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
    autoescape=jinja2.select_autoescape(),  # by the name: of .html only
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters |= {'number': '{:,}'.format, 'share': share}
ENVIRONMENT.filters['markdown'] = markdown


def render(template, /, **values):
    """The text that the template makes of the values."""
    text = ENVIRONMENT.get_template(template).render(values) + '\n'
    # The name of a file need not be valid Unicode.
    return text.encode('utf-8', 'xmlcharrefreplace').decode()
