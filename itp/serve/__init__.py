"""Planning as a service: any method of the harness behind HTTP (``python -m itp.serve``)."""
