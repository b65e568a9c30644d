"""Store and fetch data: the files of a result, content hashes, hubs, buckets and the cache of this machine.

Only this room uses google-cloud-storage. It imports config.
"""
