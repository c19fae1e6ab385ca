"""HTTP to servers of the tests, on the loopback address: no proxy, no certificates to load."""

from functools import partial

import httpx

Client = partial(httpx.Client, trust_env=False, verify=False)
get = partial(httpx.get, trust_env=False, verify=False)
post = partial(httpx.post, trust_env=False, verify=False)
