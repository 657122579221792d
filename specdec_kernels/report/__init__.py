"""One self-contained HTML page from the records of the benches: `specdec report`."""
