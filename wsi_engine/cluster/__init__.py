"""Work spread over the processes of a Dask cluster: which cluster, a connection that lasts, tasks that end."""
