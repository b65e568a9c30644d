"""Where data lies: the files of a result, content hashes, hubs, buckets, the cache of this machine.

Only this room uses google-cloud-storage. It imports config.
"""
