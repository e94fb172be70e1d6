"""From one run to a study: jobs as child processes, search, the sweep folder's table and plots. No JAX."""
