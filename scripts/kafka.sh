#!/bin/sh
# A Kafka broker for the demo, the tests and the benchmarks: one KRaft node on loopback.
#
#   kafka.sh start [--dir DIR] [--proxies N] [--secure] [--jars] [--parent PID]   prints KAFKA_BROKERS=HOST:PORT
#   kafka.sh stop --dir DIR                                                       stops what `start` started
#   kafka.sh fetch                                                                only makes sure that the jars are here
#
# Where KAFKA_BROKERS is set, that broker is taken and nothing is started or stopped. Else docker is used if an engine
# runs, else the jars from Maven with Java 17, kept in the cache. A DIR that holds a broker's data is started again
# with the same data and ports. --proxies adds listeners that tell clients to come to another port, on which a test
# can stand between; they are printed as PROXY0=PORT:TARGET. These and --secure take the jars, as does --jars, for a
# broker that is to be killed. --secure adds a listener with TLS and SCRAM for the user
# `tidemill` with the password `secret`, printed as SECURE=HOST:PORT; its certificate is DIR/ca.pem. With --parent the
# broker ends when that process does.
set -eu

VERSION=4.1.0
IMAGE=apache/kafka:$VERSION
CACHE=${TIDEMILL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tidemill}/kafka/$VERSION

NAME=kafka
. "$(dirname "$0")/common.sh"

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dir="" proxies=0 secure="" jars="" parent=""
[ $# -ge 1 ] || usage
command=$1
shift
while [ $# -gt 0 ]; do
    case $1 in
        --dir) dir=$2; shift ;;
        --proxies) proxies=$2; shift ;;
        --parent) parent=$2; shift ;;
        --secure) secure=yes ;;
        --jars) jars=yes ;;
        *) usage ;;
    esac
    shift
done

fetch() {
    [ -d "$CACHE" ] && return
    need_java
    say "fetching Apache Kafka $VERSION with Maven (120 MB, once)"
    new=$CACHE.$$
    mkdir -p "$new"
    cat > "$new/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tidemill</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$VERSION</version>
  </dependency></dependencies>
</project>
POM
    (cd "$new" && mvn -q -B dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory=libs >mvn.log 2>&1) \
        || { tail -n 5 "$new/mvn.log" >&2; fail "Maven could not fetch it; the log is $new/mvn.log"; }
    # Only a whole folder has the name that is looked for; another process may have been quicker.
    mv "$new" "$CACHE" 2>/dev/null || rm -rf "$new"
}

listening() {
    python3 -c '
import socket, sys
socket.create_connection(("127.0.0.1", int(sys.argv[1])), 0.2)' "$1" 2>/dev/null
}

alive() { [ -f "$dir/pid" ] && runs "$(cat "$dir/pid")"; }

# A certificate that signs itself, and a login.
configure_secure() {
    keytool -genkeypair -alias broker -keyalg RSA -validity 30 -dname CN=localhost -ext SAN=ip:127.0.0.1,dns:localhost \
        -storetype PKCS12 -keystore "$dir/broker.p12" -storepass tidemill >"$dir/keytool.log" 2>&1 \
        || { tail -n 5 "$dir/keytool.log" >&2; fail "cannot make a certificate"; }
    keytool -exportcert -rfc -alias broker -keystore "$dir/broker.p12" -storepass tidemill -file "$dir/ca.pem" \
        >>"$dir/keytool.log" 2>&1
    cat >> "$dir/server.properties" <<PROPERTIES
listener.name.secure.ssl.keystore.type=PKCS12
listener.name.secure.ssl.keystore.location=$dir/broker.p12
listener.name.secure.ssl.keystore.password=tidemill
listener.name.secure.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
PROPERTIES
}

# The configuration, once for a folder, so that a broker that comes back has its ports.
configure() {
    # shellcheck disable=SC2046 # one word for each port
    set -- $(free_ports $((3 + 2 * proxies)))
    port=$1 controller=$2 secured=$3
    shift 3
    listeners="PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller"
    advertised="PLAINTEXT://127.0.0.1:$port"
    protocols="PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"
    printf 'KAFKA_BROKERS=127.0.0.1:%s\n' "$port" > "$dir/addresses"
    index=0
    while [ $index -lt "$proxies" ]; do
        listeners="$listeners,PROXY$index://127.0.0.1:$1"
        advertised="$advertised,PROXY$index://127.0.0.1:$2"
        protocols="$protocols,PROXY$index:PLAINTEXT"
        printf 'PROXY%s=%s:%s\n' $index "$2" "$1" >> "$dir/addresses"
        index=$((index + 1))
        shift 2
    done
    if [ -n "$secure" ]; then
        listeners="$listeners,SECURE://127.0.0.1:$secured"
        advertised="$advertised,SECURE://127.0.0.1:$secured"
        protocols="$protocols,SECURE:SASL_SSL"
        printf 'SECURE=127.0.0.1:%s\n' "$secured" >> "$dir/addresses"
    fi
    cat > "$dir/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller
listeners=$listeners
advertised.listeners=$advertised
listener.security.protocol.map=$protocols
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs=$dir/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=2
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=2
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=1500
broker.heartbeat.interval.ms=300
group.min.session.timeout.ms=1000
transaction.abort.timed.out.transaction.cleanup.interval.ms=500
log.retention.ms=-1
num.network.threads=2
num.io.threads=4
PROPERTIES
    [ -z "$secure" ] || configure_secure
    cat > "$dir/log4j2.yaml" <<LOGGING
Configuration:
  Appenders:
    File: { name: file, fileName: $dir/server.log, PatternLayout: { pattern: "%d %p %c{1} %m%n" } }
  Loggers:
    Root: { level: WARN, AppenderRef: [{ ref: file }] }
LOGGING
}

start_jars() {
    fetch
    if [ ! -f "$dir/server.properties" ]; then
        configure
        set --
        [ -z "$secure" ] || set -- --add-scram 'SCRAM-SHA-512=[name=tidemill,password=secret]'
        java -Xmx128m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dlog4j2.configurationFile="$dir/log4j2.yaml" \
            -cp "$CACHE/libs/*" kafka.tools.StorageTool format \
            -t MkU3OEVBNTcwNTJENDM2Qk -c "$dir/server.properties" "$@" >"$dir/format.log" 2>&1 \
            || { tail -n 5 "$dir/format.log" >&2; fail "cannot format the broker's storage"; }
    fi
    setsid java -Xms256m -Xmx512m -XX:+UseSerialGC -Dlog4j2.configurationFile="$dir/log4j2.yaml" \
        -cp "$CACHE/libs/*" kafka.Kafka "$dir/server.properties" </dev/null >"$dir/out.log" 2>&1 &
    echo $! > "$dir/pid"
}

# The same settings as in `configure`, as far as they are not of its listeners.
start_docker() {
    # Other listeners need the host's network and this script's configuration.
    [ "$proxies" = 0 ] && [ -z "$secure$jars" ] || return 1
    has docker && docker info >/dev/null 2>&1 || return 1
    port=$(free_ports 1)
    docker run -d --rm -p "127.0.0.1:$port:9092" -e KAFKA_NODE_ID=1 -e KAFKA_PROCESS_ROLES=broker,controller \
        -e KAFKA_LISTENERS=PLAINTEXT://:9092,CONTROLLER://:9093 \
        -e "KAFKA_ADVERTISED_LISTENERS=PLAINTEXT://127.0.0.1:$port" \
        -e KAFKA_LISTENER_SECURITY_PROTOCOL_MAP=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT \
        -e KAFKA_CONTROLLER_QUORUM_VOTERS=1@localhost:9093 -e KAFKA_CONTROLLER_LISTENER_NAMES=CONTROLLER \
        -e KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR=1 -e KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR=1 \
        -e KAFKA_TRANSACTION_STATE_LOG_MIN_ISR=1 -e KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS=0 \
        -e KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS=2 -e KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS=2 \
        -e KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR=1 -e KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR=1 \
        -e KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS=1000 \
        -e KAFKA_TRANSACTION_ABORT_TIMED_OUT_TRANSACTION_CLEANUP_INTERVAL_MS=500 -e KAFKA_LOG_RETENTION_MS=-1 \
        -e KAFKA_AUTO_CREATE_TOPICS_ENABLE=false "$IMAGE" > "$dir/container" 2>"$dir/docker.log" || {
        say "docker cannot start $IMAGE, so the jars are taken: $(tail -n 1 "$dir/docker.log")"
        rm "$dir/container"
        return 1
    }
    printf 'KAFKA_BROKERS=127.0.0.1:%s\n' "$port" > "$dir/addresses"
}

await() {
    port=$(sed -n 's/^KAFKA_BROKERS=127.0.0.1:\([0-9]*\)$/\1/p' "$dir/addresses")
    tries=0
    # A port of docker answers before the broker does; clients try again.
    until listening "$port"; do
        tries=$((tries + 1))
        [ -f "$dir/container" ] || alive || { tail -n 5 "$dir/out.log" >&2; fail "the broker ended; its log is $dir/server.log"; }
        [ $tries -lt 300 ] || fail "the broker does not answer; its log is $dir/server.log"
        sleep 0.1
    done
}

case $command in
    fetch) fetch ;;
    start)
        if [ -n "${KAFKA_BROKERS:-}" ] && [ "$proxies" = 0 ] && [ -z "$secure" ]; then
            say "taking the broker at $KAFKA_BROKERS"
            echo "KAFKA_BROKERS=$KAFKA_BROKERS"
            exit 0
        fi
        [ -n "$dir" ] || dir=$(mktemp -d "${TMPDIR:-/tmp}/tidemill-kafka.XXXXXX")
        mkdir -p "$dir"
        dir=$(cd "$dir" && pwd)
        if alive; then
            fail "a broker runs in $dir already"
        fi
        say "starting a broker in $dir (some seconds)"
        if [ -f "$dir/server.properties" ] || ! start_docker; then
            start_jars
        fi
        await
        if [ -f "$dir/pid" ]; then
            end_with "$(cat "$dir/pid")" "$parent"
        else
            end_container_with "$(cat "$dir/container")" "$parent"
        fi
        cat "$dir/addresses"
        echo "KAFKA_DIR=$dir"
        ;;
    stop)
        [ -n "$dir" ] || usage
        if [ -f "$dir/container" ]; then
            docker stop "$(cat "$dir/container")" >/dev/null
            rm "$dir/container"
        elif alive; then
            pid=$(cat "$dir/pid")
            kill "$pid"
            tries=0
            while runs "$pid" && [ $tries -lt 100 ]; do
                tries=$((tries + 1))
                sleep 0.1
            done
            ! kill -9 "$pid" 2>/dev/null || true
            rm -f "$dir/pid"
        fi
        ;;
    *) usage ;;
esac
