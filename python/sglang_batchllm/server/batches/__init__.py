"""OpenAI's ``/v1/files`` and ``/v1/batches``: files of requests that are worked off.

In: HTTP. Out: files with an answer for each request. State is in SQLite and content in plain files
below one directory, and a worker process runs the batches by `jobs` against the server's own
address, so that the front process does nothing for them but take requests.
"""
