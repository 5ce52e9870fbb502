"""The report as one HTML page that loads nothing: the numbers of the result files inlined as JSON, drawn by
small JavaScript of this folder.
"""

from .page import folder_page, page, sweep_page, write_folder_page

__all__ = ["folder_page", "page", "sweep_page", "write_folder_page"]
