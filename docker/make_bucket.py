"""Create the bucket of SERA_STORE unless it exists: python make_bucket.py

Endpoint and credentials come from the usual AWS variables. The store itself never creates a bucket. A store
that is not on S3 needs none.
"""

import os

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

THERE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make_bucket(store: str) -> None:
    """Create the bucket of s3://bucket/prefix; an existing one keeps its content.

    Raises:
        ClientError: the bucket cannot be created, or belongs to somebody else.
    """
    if not store.startswith("s3://"):
        return
    bucket = store.removeprefix("s3://").partition("/")[0]
    by_path = Config(s3={"addressing_style": "path"})  # a server in a container has no host name per bucket
    client = botocore.session.get_session().create_client("s3", config=by_path)
    try:
        client.create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in THERE:
            raise
    client.head_bucket(Bucket=bucket)  # fails if it belongs to somebody else


if __name__ == "__main__":
    make_bucket(os.environ["SERA_STORE"])
