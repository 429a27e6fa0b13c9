package apps

// An app is one application: a server, and what a client does with it.
//
// The scripts are run by sh -eu as user 1500 in a directory of the application's
// own, which server and client share. They have PORT, where the server shall
// listen (on all addresses of both families); HOST, a name that leads to it; TLS,
// the prefix of a certificate for that name (.crt, .key, its own authority); and
// PROGRAMS, the directory testdata.
type app struct {
	name string
	// port is the usual one and portName what a Service calls it.
	port     int
	portName string
	// serverFirst says that clients wait for the server's first word.
	serverFirst bool
	// root runs the server as root.
	root bool
	// prepare runs once, before the first start of the server.
	prepare string
	// server becomes the server.
	server string
	// ready, if there is one, succeeds when the server is ready, which it otherwise
	// is as soon as it listens. HOST is its own loopback.
	ready string
	// client prints what must be equal, however it reached the server.
	client string
	// want are regular expressions for lines that it must print.
	want []string
	// connections is how many the client makes at least.
	connections uint64
	// chain is what the sidecars must take all connections for, http or tcp; empty
	// if the port speaks both.
	chain string
}

var table = []app{
	{
		name: "redis", port: 6379, portName: "redis", chain: "tcp", connections: 200,
		server: `exec redis-server --port $PORT --bind 0.0.0.0 :: --protected-mode no --save "" --dir .`,
		client: `
r() { redis-cli -h $HOST -p $PORT "$@"; }
r FLUSHALL
# 20,000 commands on one connection before the first answer is read.
seq 20000 | awk '{printf "SET key:%d value-%d\r\n", $1, $1 * 7}' | r --pipe | grep replies
r DBSIZE
seq 20000 | sed 's/^/GET key:/' | r | sha256sum
seq 3000000 >big; r -x SET big <big; r --raw GET big | head -c -1 | cmp - big && wc -c <big
printf 'MULTI\nINCR n\nINCR n\nEXEC\n' | r
# One waits in a list and one in a channel, as long as nothing comes.
r BLPOP jobs 30 >popped & pop=$!
r --csv SUBSCRIBE news >heard & sub=$!
until [ "$(r CLIENT LIST TYPE pubsub | grep -c sub=1)" = 1 ]; do :; done
r LPUSH jobs job >pushed; wait $pop; cat popped
r PUBLISH news hello
until grep -q hello heard; do :; done
kill $sub; cat heard
# 200 connections, 16 commands at a time.
redis-benchmark -h $HOST -p $PORT -q -c 200 -n 20000 -P 16 -r 1000000 -t set,get --csv | cut -d, -f1
`,
		want: []string{`errors: 0, replies: 20000`, `^20000$`, `^22888896$`, `"message","news","hello"`, `^"GET"$`},
	},
	{
		name: "postgresql", port: 5432, portName: "postgres", chain: "tcp", connections: 25,
		prepare: `
PATH=$(echo /usr/lib/postgresql/*/bin | tr ' ' '\n' | tail -n 1):$PATH
initdb -D data -U app -A trust --no-sync -E UTF8 --locale=C.UTF-8 >initdb.log
echo 'host all all all trust' >>data/pg_hba.conf`,
		server: `
PATH=$(echo /usr/lib/postgresql/*/bin | tr ' ' '\n' | tail -n 1):$PATH
rm -f data/postmaster.pid
exec postgres -D data -p $PORT -c listen_addresses='*' -c unix_socket_directories= -c fsync=off \
	-c ssl=on -c ssl_cert_file=$TLS.crt -c ssl_key_file=$TLS.key`,
		ready: `$(echo /usr/lib/postgresql/*/bin | tr ' ' '\n' | tail -n 1)/pg_isready -q -h $HOST -p $PORT`,
		client: `
PATH=$(echo /usr/lib/postgresql/*/bin | tr ' ' '\n' | tail -n 1):$PATH
export PGHOST=$HOST PGPORT=$PORT PGUSER=app PGDATABASE=postgres PGSSLROOTCERT=$TLS.crt
q() { psql -XAtq -v ON_ERROR_STOP=1 "$@"; }
seq 200000 | awk '{printf "%d\ttext %d\n", $1, $1 * 13}' >rows
for PGSSLMODE in disable verify-full; do
	export PGSSLMODE
	q -c 'SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()'
	q -c 'DROP TABLE IF EXISTS t' 2>dropped
	q -c 'CREATE TABLE t (id int PRIMARY KEY, s text)'
	q -c 'COPY t FROM STDIN' <rows
	q -c 'SELECT count(*), sum(id), md5(string_agg(s, chr(10) ORDER BY id)) FROM t'
	q -c 'COPY (SELECT * FROM t ORDER BY id) TO STDOUT' | cmp - rows && echo copied
	q -v FETCH_COUNT=1000 -c 'SELECT id FROM t ORDER BY id DESC' | sha256sum
	# What is asked for on a second connection ends the first one's query.
	(sleep=$(q -c "SELECT pg_sleep(60)" 2>&1) || echo "$sleep") >cancelled & asleep=$!
	until q -c "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'" | grep -q t; do :; done
	wait $asleep; cat cancelled
done
# The client's own way to cancel: a connection that is sent 16 bytes and closed.
timeout --foreground -s INT 1 psql -Xq -c 'SELECT pg_sleep(60)' 2>&1 || true
pgbench -i -q -s 1 2>bench.log >&2
pgbench -n -c 20 -j 2 -t 50 2>bench.log | grep -E 'processed|failed'
q -c 'SELECT count(*) FROM pgbench_history'
`,
		want: []string{`^f\|$`, `^t\|TLSv1\.3$`, `^200000\|20000100000\|`, `copied`, `canceling statement due to user request`, `1000/1000`, `^1000$`},
	},
	{
		name: "mariadb", port: 3306, portName: "mysql", serverFirst: true, chain: "tcp", connections: 50,
		prepare: `mariadb-install-db --no-defaults --datadir=$PWD/data --auth-root-authentication-method=normal --skip-test-db --innodb-log-file-size=4M >install.log 2>&1 || { cat install.log >&2; exit 1; }
printf "%s\n" "CREATE OR REPLACE USER app IDENTIFIED BY 'secret';" 'GRANT ALL ON *.* TO app;' 'CREATE DATABASE IF NOT EXISTS app;' >init.sql`,
		server: `exec mariadbd --no-defaults --datadir=$PWD/data --bind-address=* --port=$PORT --socket=$PWD/sock --pid-file=$PWD/pid \
	--init-file=$PWD/init.sql --innodb-flush-log-at-trx-commit=0 --innodb-log-file-size=4M --skip-name-resolve --max-allowed-packet=64M \
	--max-connections=300 --connect-timeout=90 --ssl-cert=$TLS.crt --ssl-key=$TLS.key --ssl-ca=$TLS.crt`,
		client: `
q() { mariadb --no-defaults --protocol=tcp -h $HOST -P $PORT -u app -psecret -BN --max-allowed-packet=64M "$@" app; }
seq 100000 | awk '{printf "%d\ttext %d\n", $1, $1 * 13}' >rows
for how in --skip-ssl "--ssl --ssl-ca=$TLS.crt --ssl-verify-server-cert" --compress; do
	q $how -e "SHOW STATUS LIKE 'Ssl_version'; DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, s longtext)"
	q $how --local-infile=1 -e "LOAD DATA LOCAL INFILE 'rows' INTO TABLE t"
	q $how -e 'SELECT count(*), sum(id), sum(crc32(s)) FROM t'
	q $how --quick -e 'SELECT * FROM t ORDER BY id' | cmp - rows && echo fetched
	(printf "INSERT INTO t VALUES (0, '"; head -c 12000000 /dev/zero | tr '\0' x; printf "');") | q $how
	q $how -e 'SELECT length(s), sha1(s) FROM t WHERE id = 0'
	q $how -e 'SELECT s FROM t WHERE id = 0' | wc -c
done
q -e 'CREATE OR REPLACE TABLE n (i int)'
clients=
for i in $(seq 50); do q --skip-ssl -e "INSERT INTO n VALUES ($i); DO SLEEP(0.1); SELECT 'client', $i" >client.$i & clients="$clients $!"; done
for c in $clients; do wait $c; done
cat client.* | sort | sha256sum; q -e 'SELECT count(*), sum(i) FROM n'
`,
		want: []string{`^Ssl_version\tTLSv1\.3$`, `^100000\t5000050000\t`, `fetched`, `^12000000\t`, `^12000001$`, `^50\t1275$`},
	},
	{
		name: "nginx", port: 80, portName: "http", root: true, chain: "http", connections: 10,
		prepare: `
mkdir -p www tmp && seq 4000000 >www/big && echo hello >www/hello.txt && ln -sf "$PROGRAMS" programs`,
		server: `
cat >nginx.conf <<-END
	daemon off; user root; pid nginx.pid; error_log stderr; worker_processes 2;
	events { worker_connections 4096; }
	http {
		access_log off; client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
		types { text/plain txt; } client_max_body_size 100m; keepalive_requests 100000; etag off;
		server {
			listen $PORT; listen [::]:$PORT; root www;
			location /up/ { dav_methods PUT DELETE; create_full_put_path on; }
			location /slow { limit_rate 2m; alias www/hello.txt; }
			location /moved { return 301 /hello.txt; }
			location /gone { return 410 "gone\n"; }
			location /see { add_header X-Seen "\$request_method|\$request_uri|\$http_host|\$http_x_case|\$http_x_long"; return 200 "seen\n"; }
		}
	}
END
exec nginx -e stderr -p $PWD/ -c $PWD/nginx.conf`,
		client: `
u=http://$HOST:$PORT
# "Connection" is between neighbours.
curl -sSi $u/hello.txt | tr -d '\r' | grep -v -E '^(Date|Connection)'
curl -sS $u/big | cmp - www/big && echo big
curl -sS -r 1000-1099 $u/big | sha256sum
curl -sS --http1.0 $u/hello.txt
curl -sSI $u/big | grep -i content-length | tr -d '\r'
curl -sSL $u/moved
curl -sS -o /dev/null -w '%{http_code}\n' $u/gone $u/none
curl -sSI "$u/see?a=b%20c&d" -X GET -H 'X-Case: aBc' -H "X-Long: $(head -c 6000 /dev/zero | tr '\0' l)" -H 'Host: shop.example' | grep -i seen | sha256sum
# With and without a length, and with "Expect: 100-continue" as curl sends it.
curl -sS -T www/big -w '%{http_code}\n' $u/up/one; curl -sS $u/up/one | cmp - www/big && echo put
curl -sS -T - -w '%{http_code}\n' $u/up/two <www/big; curl -sS $u/up/two | cmp - www/big && echo chunked
curl -sS -X DELETE -w '%{http_code}\n' $u/up/one $u/up/two
# 30 at once, and thousands on kept and on new connections.
curl -sSZ --parallel-max 30 "$u/hello.txt?[1-300]" | sort | uniq -c
ab -q -k -c 50 -n 5000 $u/hello.txt | grep -E '^(Complete|Failed|Non-2xx|HTML)'
ab -q -c 50 -n 3000 $u/hello.txt | grep -E '^(Complete|Failed|Non-2xx|HTML)'
`,
		want: []string{`^Server: nginx`, `^big$`, `^410$`, `^404$`, `^put$`, `^chunked$`, `300 hello`, `Complete requests: +5000`, `Failed requests: +0`},
	},
	{
		name: "nginx-tls", port: 443, portName: "https", root: true, chain: "tcp", connections: 10,
		prepare: `mkdir -p www tmp && seq 4000000 >www/big && echo hello >www/hello.txt`,
		server: `
cat >nginx.conf <<-END
	daemon off; user root; pid nginx.pid; error_log stderr; worker_processes 2;
	events { worker_connections 4096; }
	http {
		access_log off; client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
		ssl_certificate $TLS.crt; ssl_certificate_key $TLS.key;
		server { listen $PORT ssl http2; listen [::]:$PORT ssl http2; root www; }
	}
END
exec nginx -e stderr -p $PWD/ -c $PWD/nginx.conf`,
		client: `
u=https://$HOST:$PORT
c() { curl -sS --cacert $TLS.crt "$@"; }
for how in --http1.1 --http2 --tlsv1.3 --tls-max=1.2; do
	c $(echo $how | tr = ' ') -o got -w '%{http_version} %{ssl_verify_result}\n' $u/big && cmp got www/big && echo $how
done
c --http2 -Z --parallel-max 50 "$u/hello.txt?[1-500]" | sort | uniq -c
c --http1.1 -Z --parallel-max 50 "$u/hello.txt?[1-500]" | sort | uniq -c
`,
		want: []string{`^2 0$`, `^1\.1 0$`, `^--tls-max=1\.2$`, `500 hello`},
	},
	{
		name: "openssh", port: 22, portName: "ssh", root: true, serverFirst: true, chain: "tcp", connections: 8,
		prepare: `
ssh-keygen -q -t ed25519 -N '' -f key && ssh-keygen -q -t ed25519 -N '' -f host
cp key.pub authorized && chmod 600 authorized
cat >sshd_config <<-END
	HostKey $PWD/host
	AuthorizedKeysFile $PWD/authorized
	StrictModes no
	PidFile none
	Subsystem sftp internal-sftp
	MaxSessions 100
	MaxStartups 100
END
cat >ssh_config <<-END
	Host *
	User app
	IdentityFile $PWD/key
	IdentitiesOnly yes
	StrictHostKeyChecking no
	UserKnownHostsFile /dev/null
	LogLevel ERROR
	BatchMode yes
END
seq 1000000 >big`,
		server: `exec /usr/sbin/sshd -D -e -f $PWD/sshd_config -p $PORT -o ListenAddress=0.0.0.0 -o ListenAddress=::`,
		client: `
rm -f control there back
s() { ssh -F ssh_config -p $PORT "$@"; }
s $HOST 'echo $USER; exit 7' || echo status $?
s $HOST cat <big | cmp - big && echo both ways
s -C -o RekeyLimit=1M -c aes128-ctr $HOST cat <big | cmp - big && echo keys renewed
scp -F ssh_config -P $PORT -q big $HOST:$PWD/there && cmp there big && echo scp
printf 'get there back\nput big there\nls -1 key.pub\n' | sftp -q -F ssh_config -P $PORT -b - $HOST:$PWD | tail -n 1; cmp back big && cmp there big && echo sftp
# 20 sessions in one connection.
ssh -F ssh_config -p $PORT -o ControlMaster=yes -o ControlPath=$PWD/control -N $HOST & master=$!
until s -S $PWD/control -O check $HOST 2>control.log; do kill -0 $master; done
sessions=
for i in $(seq 20); do s -S $PWD/control $HOST "seq $i 200000 | sha256sum" >sum.$i & sessions="$sessions $!"; done
wait $sessions; cat $(seq -f sum.%g 20)
# And a forwarded port, which leads to the server's own greeting.
s -S $PWD/control -O forward -L 127.0.0.1:2022:127.0.0.1:$PORT $HOST
ssh -F ssh_config -p 2022 127.0.0.1 echo forwarded
kill $master; wait $master || true
# A burst of connections.
for i in $(seq 8); do s $HOST echo $i >burst.$i & done
wait; cat burst.*
`,
		want: []string{`^app$`, `^status 7$`, `both ways`, `keys renewed`, `^scp$`, `^sftp$`, `forwarded`, `^8$`},
	},
	{
		name: "smtp", port: 25, portName: "smtp", root: true, serverFirst: true, chain: "tcp", connections: 200,
		server: `exec /usr/bin/python3 $PROGRAMS/smtpd.py $PORT $TLS stored`,
		client: `
: >stored
m() { swaks --server $HOST --port $PORT --helo client --from a@example.test --to b@example.test --header-Date now --header-Message-Id '<1>' "$@" |
	grep -E '^(<-|<~|===)' | grep -v -E 'Trying|Connected|local_hostname|TLS (no|peer|server|started)' ; }
m --header 'Subject: plain' --body hello
m --header 'Subject: encrypted' --body hello -tls
seq 200000 >body; m --header 'Subject: large' --body @body -tls | tail -n 3
smtp-source -s 20 -m 200 -l 20000 -f a@example.test -t b@example.test inet:$HOST:$PORT
wc -l <stored; grep -v 'from smtp-source' stored; grep -c 'from smtp-source 20' stored
`,
		want: []string{`^<-  220 `, `^<~  250`, `^203$`, `^200$`, `encrypted`},
	},
	{
		name: "nats", port: 4222, portName: "nats", serverFirst: true, chain: "tcp", connections: 50,
		server: `rm -rf store; exec nats-server -a :: -p $PORT -js -sd store`,
		client: `exec /usr/bin/python3 $PROGRAMS/nats_client.py nats://$HOST:$PORT`,
		want:   []string{`^received 20000 in order True$`, `^replies 500 right True each once True$`, `^jetstream 5000`, `^large 1000000 True$`, `^slow 1$`},
	},
	{
		name: "mosquitto", port: 1883, portName: "mqtt", chain: "tcp", connections: 20,
		server: `printf 'listener %s\nallow_anonymous true\nmax_queued_messages 0\n' $PORT >mosquitto.conf; exec mosquitto -c mosquitto.conf`,
		client: mqttClient,
		want:   []string{`^retained$`, `^5000 `, `^gone without a word$`, `^4788895$`, `20 message-20`},
	},
	{
		name: "mosquitto-tls", port: 8883, portName: "tls-mqtt", chain: "tcp", connections: 20,
		server: `printf 'listener %s\nallow_anonymous true\nmax_queued_messages 0\ncertfile %s.crt\nkeyfile %s.key\n' $PORT $TLS $TLS >mosquitto.conf; exec mosquitto -c mosquitto.conf`,
		client: `SECURE="--cafile $TLS.crt"` + mqttClient,
		want:   []string{`^retained$`, `^5000 `, `^gone without a word$`, `^4788895$`, `20 message-20`},
	},
	{
		// gRPC and HTTP/1 with JSON on one port.
		name: "etcd", port: 2379, portName: "client", chain: "http", connections: 20,
		server: `rm -rf data; exec etcd --data-dir data --unsafe-no-fsync --log-level error --listen-peer-urls http://127.0.0.1:2380 \
	--listen-client-urls http://[::]:$PORT --advertise-client-urls http://$HOST:$PORT`,
		ready: `ETCDCTL_API=3 etcdctl --endpoints http://$HOST:$PORT endpoint health 2>/dev/null`,
		client: `
export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=http://$HOST:$PORT
curl -sS http://$HOST:$PORT/health
etcdctl watch --prefix w/ >watched & watch=$!
until etcdctl put w/0 ready >put.log && grep -q ready watched; do :; done
seq 20 | xargs -P 10 -I{} etcdctl put w/{} value-{} | sort | uniq -c
until [ "$(grep -c value- watched)" = 20 ]; do :; done
kill $watch; grep value- watched | sort -V
head -c 1000000 /dev/zero | tr '\0' x | etcdctl put big
etcdctl get big --print-value-only | wc -c
printf 'value("w/1") = "value-1"\n\nput w/1 swapped\nget w/2\n\nput w/1 not\n\n' | etcdctl txn
lease=$(etcdctl lease grant 600 | cut -d' ' -f2)
etcdctl put --lease=$lease leased yes; etcdctl lease revoke $lease | cut -d' ' -f3; etcdctl get leased
etcdctl lock mutex echo locked
etcdctl snapshot save snapshot 2>snapshot.log | grep -c 'aved'
curl -sS http://$HOST:$PORT/v3/kv/range -X POST -d '{"key": "dy8y"}' | grep -o '"value":"[^"]*"'
`,
		want: []string{`"health":"true"`, `20 OK`, `^value-20$`, `^1000001$`, `SUCCESS`, `^revoked$`, `^locked$`, `"value":"dmFsdWUtMg=="`},
	},
	{
		name: "grpc", port: 50051, portName: "grpc", chain: "http", connections: 5,
		server: `exec /usr/bin/python3 $PROGRAMS/grpc_server.py $PORT`,
		client: `exec /usr/bin/python3 $PROGRAMS/grpc_client.py $HOST:$PORT`,
		want:   []string{`^unary 2000 True$`, `^duplex 2000$`, `^large 20000000 True$`, `NOT_FOUND nothing here`, `DEADLINE_EXCEEDED`, `^trailer `, `^cancelled True still here$`},
	},
	{
		name: "websocket", port: 8765, portName: "ws", chain: "http", connections: 100,
		server: `exec /usr/bin/python3 $PROGRAMS/websocket_server.py $PORT`,
		client: `exec /usr/bin/python3 $PROGRAMS/websocket_client.py ws://$HOST:$PORT`,
		want:   []string{`^echoed 2000 True$`, `^large 8000000 True$`, `^closed 4001 bye`, `^clients 100$`, `^subprotocol chat None$`},
	},
	{
		name: "http2", port: 8081, portName: "http2", chain: "http", connections: 10,
		prepare: `mkdir -p www && seq 1000000 >www/big && echo hello >www/hello.txt`,
		server:  `exec nghttpd --no-tls -n 2 -d www --trailer 'x-trailer: end' --echo-upload $PORT`,
		client: `
u=http://$HOST:$PORT
curl -sS --http2-prior-knowledge -i $u/hello.txt | tr -d '\r' | grep -v -E '^(date|last-modified)'
curl -sS --http2-prior-knowledge $u/big | cmp - www/big && echo big
curl -sS --http2-prior-knowledge -T www/big $u/echo | cmp - www/big && echo echoed
nghttp -n -v $u/hello.txt | grep -c x-trailer
h2load -n 10000 -c 10 -m 100 $u/hello.txt | grep -E '^(requests|status codes)'
h2load -n 60 -c 3 -m 20 $u/big | grep -E '^(requests|status codes)'
`,
		want: []string{`^HTTP/2 200`, `^big$`, `^echoed$`, `^2$`, `10000 succeeded, 0 failed`, `60 succeeded`},
	},
	{
		name: "iperf3", port: 5201, portName: "tcp-iperf3", chain: "tcp", connections: 20,
		server: `exec iperf3 -s -p $PORT`,
		client: `
i() { iperf3 -c $HOST -p $PORT -J "$@" >result.json && /usr/bin/python3 $PROGRAMS/iperf3_result.py "$*" <result.json; }
i -n 256M
i -n 256M -R
i -n 128M -P 8
i -n 128M -P 8 -R
i -n 64M -l 1000
i -t 2 -b 20M
`,
		want: []string{`^-n 256M: all sent, 1 streams, received most`, `^-t 2 -b 20M: `},
	},
	{
		name: "rsync", port: 873, portName: "rsync", chain: "tcp", connections: 4,
		prepare: `
mkdir -p from && for i in $(seq 500); do seq $i 2000 >from/$i; done && seq 4000000 >from/big
printf 'uid = 0\ngid = 0\nuse chroot = no\n[data]\npath = %s/from\n[up]\npath = %s/to\nread only = no\n' "$PWD" "$PWD" >rsyncd.conf`,
		root:   true,
		server: `rm -rf to got; mkdir to; exec rsync --daemon --no-detach --config=rsyncd.conf --port=$PORT --log-file=server.log`,
		client: `
rsync rsync://$HOST:$PORT/
rsync -a rsync://$HOST:$PORT/data/ got && diff -r got from && echo fetched
rsync -az from/ rsync://$HOST:$PORT/up/ && diff -r to from && echo sent
echo more >>got/big; rsync -ac --stats rsync://$HOST:$PORT/data/ got | grep 'transferred: '; cmp got/big from/big && echo mended
rsync rsync://$HOST:$PORT/none/ 2>&1 | head -n 1
`,
		want: []string{`^fetched$`, `^sent$`, `files transferred: 1$`, `^mended$`, `Unknown module 'none'`},
	},
}

// Lines that begin with Client or Subscribed are the clients' own (-d).
const mqttClient = `
common="-h $HOST -p $PORT ${SECURE-}"
p() { mosquitto_pub $common "$@"; }
s() { mosquitto_sub $common -W 60 "$@"; }
payload() { grep -v -E '^(Client|Subscribed)' "$1"; }
p -t state -r -q 1 -m retained; s -t state -C 1; p -t state -r -n
# What a session misses it gets later, exactly once and in order.
s -c -i keeper -q 2 -t lines -E
seq 5000 | p -q 2 -t lines -l
s -c -i keeper -q 2 -t lines -C 5000 >lines; seq 5000 | cmp - lines && wc -l lines; s -i keeper -t lines -E
# A will is sent when its connection ends without a word.
w() { file=$1; shift; stdbuf -oL mosquitto_sub $common -W 60 -d "$@" >$file & }
w will -t will -C 1; heard=$!
w heir -i heir -t x --will-topic will --will-payload 'gone without a word'
until grep -q ^Subscribed will && grep -q ^Subscribed heir; do :; done
kill -9 $!; wait $heard; payload will
seq 700000 >big; w got -q 1 -t big -C 1; sub=$!
until grep -q ^Subscribed got; do :; done
p -q 1 -V 5 -t big -f big; wait $sub; payload got | head -c -1 | cmp - big && wc -c <big
subs=
for i in $(seq 20); do w many.$i -t many -C 20; subs="$subs $!"; done
until [ "$(cat many.* | grep -c ^Subscribed)" = 20 ]; do :; done
for i in $(seq 20); do p -t many -m message-$i & done; wait $subs
cat many.* | grep message- | sort | uniq -c
`
