#!/bin/sh
# Renders users.acl (beside this file) with the passwords of the environment, as hashes, and runs the server with it:
#   redis.sh redis-server --appendonly yes …
# ACL_FILE is where the rendered file goes. Each role has its variable: REDIS_CLIENT_PASSWORD, REDIS_LOOKUP_PASSWORD, …
set -eu
here=$(dirname "$0")
target=${ACL_FILE:-/tmp/users.acl}
hashes=
for role in $(sed -n 's/^user \([a-z]*\) on @.*/\1/p' "$here/users.acl"); do
  name=REDIS_$(printf %s "$role" | tr '[:lower:]' '[:upper:]')_PASSWORD
  eval "password=\${$name:-}"
  if [ -z "$password" ]; then
    echo "redis.sh: $name is not set: every role needs a password" >&2
    exit 2
  fi
  hashes="$hashes$role $(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
"
done
umask 077
printf %s "$hashes" | awk '
  NR == FNR { hash["@" $1 "@"] = "#" $2; next }
  /^#/ || /^[ \t]*$/ { next }
  { for (i = 1; i <= NF; i++) if ($i in hash) $i = hash[$i] }
  /^user/ { if (line) print line; line = $0; next }
  { sub(/^[ \t]+/, ""); line = line " " $0 }
  END { print line }
' - "$here/users.acl" >"$target"
if [ "$(id -u)" = 0 ] && id redis >/dev/null 2>&1; then chown redis "$target"; fi # the image runs the server as redis
exec "$@" --aclfile "$target"
