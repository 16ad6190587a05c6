"""Make the bucket of SERA_STORE unless it is there: python make_bucket.py

Endpoint and credentials come from the usual AWS variables. The store itself makes no bucket, and one that
is not S3 needs none.
"""

import os

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

THERE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make_bucket(store: str) -> None:
    """Make the bucket that s3://bucket/prefix names; what a bucket holds stays.

    Raises:
        ClientError: it cannot be made, or belongs to somebody else.
    """
    if not store.startswith("s3://"):
        return
    bucket = store.removeprefix("s3://").partition("/")[0]
    by_path = Config(s3={"addressing_style": "path"})  # a server in a container has no name for each bucket
    client = botocore.session.get_session().create_client("s3", config=by_path)
    try:
        client.create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in THERE:
            raise
    client.head_bucket(Bucket=bucket)  # refused when it is somebody else's


if __name__ == "__main__":
    make_bucket(os.environ["SERA_STORE"])
