#!/bin/sh
# Write the passwords of kustomization.yaml to secrets/, which git ignores. Files that exist are kept.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets

random() {
  od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

keep() { # keep FILE LINE...: write the lines unless the file exists
  file=secrets/$1
  shift
  if [ -e "$file" ]; then
    echo "$file: kept"
  else
    printf '%s\n' "$@" >"$file"
    echo "$file: written"
  fi
}

# Password of the UI and every client.
keep prefect.env "PREFECT_AUTH_STRING=admin:$(random)"
# Password of Prefect's database. Used once, when the volume is created.
keep postgres.env "POSTGRES_PASSWORD=$(random)"
# The store: its keys and where it is. For a bucket of your own, put yours here.
keep s3.env AWS_ACCESS_KEY_ID=sera "AWS_SECRET_ACCESS_KEY=$(random)" \
  AWS_ENDPOINT_URL=http://seaweedfs:8333 AWS_DEFAULT_REGION=us-east-1
