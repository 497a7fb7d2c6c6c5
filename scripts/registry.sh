#!/bin/sh
# A schema registry for the tests and for trying formats: Apicurio, in memory, on loopback.
#
#   registry.sh start [--dir DIR] [--parent PID]   prints SCHEMA_REGISTRY_URL=http://HOST:PORT/PATH
#   registry.sh stop --dir DIR                     stops what `start` started
#   registry.sh fetch                              only makes sure that it is here
#
# It needs Java 17 and is fetched with Maven, once. What is registered is gone with it. With --parent it ends when that
# process does.
set -eu

VERSION=2.5.11.Final
CACHE=${TIDEMILL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tidemill}/apicurio/$VERSION

NAME=registry
. "$(dirname "$0")/common.sh"

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dir="" parent=""
[ $# -ge 1 ] || usage
command=$1
shift
while [ $# -gt 0 ]; do
    case $1 in
        --dir) dir=$2 ;;
        --parent) parent=$2 ;;
        *) usage ;;
    esac
    shift 2
done

fetch() {
    [ -d "$CACHE" ] && return
    need_java
    say "fetching Apicurio Registry $VERSION with Maven (140 MB, once)"
    new=$CACHE.$$
    mkdir -p "$new"
    cat > "$new/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tidemill</groupId><artifactId>registry</artifactId><version>1</version>
</project>
POM
    (cd "$new" && mvn -q -B dependency:copy -DoutputDirectory=. \
        -Dartifact="io.apicurio:apicurio-registry-app:$VERSION:tar.gz:all" >mvn.log 2>&1) \
        || { tail -n 5 "$new/mvn.log" >&2; fail "Maven could not fetch it; the log is $new/mvn.log"; }
    tar -xzf "$new"/*.tar.gz -C "$new"
    rm "$new"/*.tar.gz
    # Only a whole folder has the name that is looked for; another process may have been quicker.
    mv "$new" "$CACHE" 2>/dev/null || rm -rf "$new"
}

answers() {
    python3 -c '
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/subjects", timeout=1)' "$1" 2>/dev/null
}

case $command in
    fetch) fetch ;;
    start)
        fetch
        [ -n "$dir" ] || dir=$(mktemp -d "${TMPDIR:-/tmp}/tidemill-registry.XXXXXX")
        mkdir -p "$dir"
        dir=$(cd "$dir" && pwd)
        port=$(free_ports 1)
        say "starting a registry in $dir (some seconds)"
        # It writes into the folder that it runs in.
        cd "$dir"
        setsid java -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dquarkus.http.host=127.0.0.1 \
            -Dquarkus.http.port="$port" -jar "$CACHE"/*-runner.jar </dev/null >"$dir/out.log" 2>&1 &
        pid=$!
        echo $pid > "$dir/pid"
        url=http://127.0.0.1:$port/apis/ccompat/v7
        tries=0
        until answers "$url"; do
            tries=$((tries + 1))
            runs $pid || { tail -n 5 "$dir/out.log" >&2; fail "it ended; its log is $dir/out.log"; }
            [ $tries -lt 300 ] || fail "it does not answer; its log is $dir/out.log"
            sleep 0.2
        done
        end_with $pid "$parent"
        echo "SCHEMA_REGISTRY_URL=$url"
        echo "REGISTRY_DIR=$dir"
        ;;
    stop)
        [ -n "$dir" ] || usage
        ! kill "$(cat "$dir/pid")" 2>/dev/null || true
        rm -f "$dir/pid"
        ;;
    *) usage ;;
esac
