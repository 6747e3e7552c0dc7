"""Reports from result folders: tables, figures, one page."""
