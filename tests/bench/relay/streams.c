/*
 * Event streams for the relay benchmark: their source, which is an engine, and their sink, which is many clients.
 *
 *   streams source SOCKET
 *   streams sink ENDPOINT MODEL STREAMS SECONDS BATCH     ENDPOINT: unix:PATH, or a port of 127.0.0.1
 *
 * Each is one thread around epoll(7) and takes as little CPU time as it can, so that on a small machine the figures are the
 * gateway's. An event tells when it was written ("t", CLOCK_MONOTONIC, the same for all processes); its latency is the time from
 * then until the sink has read it. It also tells by how much the source was late ("late"), which is no part of the latency.
 *
 * The sink says in each request when in a period of 20 ms its events are due ("phase_us"). BATCH streams share a phase, as the
 * streams of one engine share its steps; the phases of the batches are spread evenly. A batch of 1 spreads all events.
 *
 * The source answers a chat request with `stream` by `max_tokens` events, one without by `max_tokens` bytes, all else by 200. A
 * stream whose reader is behind by a whole socket buffer (seconds) is cut: there is nothing left to measure.
 *
 * The sink checks every event's place, their count, and that each answer ends as it should. It writes `measuring` when all
 * streams are under way, `measured` SECONDS later, and in the end, a line of JSON; times are in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000LL
#define RATE 50
#define PERIOD_US (1000000 / RATE)
#define SLOT_US 100 /* how finely a period is divided */
#define SLOTS (PERIOD_US / SLOT_US)
#define READY_MAX 512

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "streams: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int check(int result, const char *what)
{
    if (result < 0)
        die(what);
    return result;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

/* The number after `name` in a text that ends with a NUL; -1 when there is none. */
static int64_t number(const char *text, const char *name)
{
    const char *found = strstr(text, name);
    return found ? strtoll(found + strlen(name), NULL, 10) : -1;
}

static void watch(int poll, int how, int fd, uint32_t events, void *data)
{
    struct epoll_event event = {.events = events, .data.ptr = data};
    check(epoll_ctl(poll, how, fd, &event), "epoll_ctl");
}

static int unix_socket(const char *path, struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address->sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(address->sun_path, path);
    return check(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
}

/* The source. */

struct client {
    int fd;
    bool streams;
    int64_t left;         /* events or bytes of the answer under way */
    int64_t written;      /* events */
    unsigned slot;
    struct client *next;  /* in the same slot */
    size_t used;
    char request[8192];
};

static int clients; /* epoll */
static struct client *slots[SLOTS];
static unsigned streaming; /* clients in all slots */
static int timer;
static int64_t due_ns; /* the slot whose turn is next */
static unsigned turn;

/* The clock stands while there are no streams: other parts of the benchmark shall not hear it tick. */
static void start_clock(void)
{
    due_ns = now_ns() + NS_PER_S / 1000;
    struct itimerspec when = {
        .it_value = {due_ns / NS_PER_S, due_ns % NS_PER_S},
        .it_interval = {0, SLOT_US * 1000},
    };
    check(timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL), "timerfd_settime");
}

static void stop_clock(void)
{
    check(timerfd_settime(timer, 0, &(struct itimerspec){0}, NULL), "timerfd_settime");
}

static void enter_slot(struct client *client, unsigned slot)
{
    client->slot = slot;
    client->next = slots[slot];
    slots[slot] = client;
    if (streaming++ == 0)
        start_clock();
}

static void leave_slot(struct client *client)
{
    struct client **link = &slots[client->slot];
    while (*link != client)
        link = &(*link)->next;
    *link = client->next;
    client->streams = false;
    if (--streaming == 0)
        stop_clock();
}

static bool send_all(struct client *client, const char *data, size_t size)
{
    return send(client->fd, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

/* False: the stream is over, or cut. A client is freed nowhere but in `read_client`, which epoll calls for a cut one as well. */
static bool send_event(struct client *client)
{
    static const char size_line[] = "??\r\n"; /* two digits: a chunk of 16 to 255 bytes */
    static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    char out[320];
    char *event = out + strlen(size_line);
    int64_t now = now_ns();
    int size = sprintf(event,
                       "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"streams\","
                       "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"finish_reason\":null}],"
                       "\"n\":%lld,\"t\":%lld,\"late\":%lld}\n\n",
                       (long long)client->written, (long long)now, (long long)(now - due_ns));
    out[0] = "0123456789abcdef"[size >> 4];
    out[1] = "0123456789abcdef"[size & 15];
    memcpy(out + 2, size_line + 2, 2);
    memcpy(event + size, "\r\n", 2);
    client->written++;
    client->left--;
    bool sent = send_all(client, out, strlen(size_line) + size + 2);
    if (sent && client->left == 0)
        sent = send_all(client, end, strlen(end));
    if (!sent) {
        perror("streams: a stream is cut");
        shutdown(client->fd, SHUT_RDWR);
    }
    return sent && client->left > 0;
}

static void tick(void)
{
    uint64_t expired;
    if (read(timer, &expired, sizeof expired) < 0)
        return; /* the clock has been stopped or started since */
    for (; expired > 0; expired--) {
        struct client *next;
        for (struct client *client = slots[turn]; client; client = next) {
            next = client->next;
            if (!send_event(client))
                leave_slot(client);
        }
        turn = (turn + 1) % SLOTS;
        due_ns += SLOT_US * 1000;
    }
}

/* As many bytes of a large answer as the socket takes. Only while some are left does epoll look for room. */
static void send_bytes(struct client *client)
{
    static char piece[64 << 10];
    memset(piece, 'x', sizeof piece);
    while (client->left > 0) {
        size_t size = client->left < (int64_t)sizeof piece ? (size_t)client->left : sizeof piece;
        ssize_t sent = send(client->fd, piece, size, MSG_NOSIGNAL);
        if (sent < 0)
            break;
        client->left -= sent;
    }
    watch(clients, EPOLL_CTL_MOD, client->fd, client->left > 0 ? EPOLLIN | EPOLLOUT : EPOLLIN, client);
}

static void answer(struct client *client, const char *body)
{
    char head[128];
    client->left = number(body, "\"max_tokens\":");
    if (client->left <= 0) { /* such as the runner's check of our health */
        client->left = 0;
        sprintf(head, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    } else if (strstr(body, "\"stream\":true")) {
        sprintf(head, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    } else {
        sprintf(head, "HTTP/1.1 200 OK\r\nContent-Length: %lld\r\n\r\n", (long long)client->left);
    }
    send_all(client, head, strlen(head));
    if (strstr(head, "event-stream")) {
        int64_t phase_us = number(body, "\"phase_us\":");
        client->streams = true;
        client->written = 0;
        enter_slot(client, phase_us > 0 ? phase_us / SLOT_US % SLOTS : 0);
    } else {
        send_bytes(client);
    }
}

/* False: the client has gone, or says what we do not understand. */
static bool take_request(struct client *client)
{
    ssize_t got = recv(client->fd, client->request + client->used, sizeof client->request - client->used - 1, 0);
    if (got < 0 && errno == EAGAIN)
        return true;
    if (got <= 0)
        return false;
    client->used += got;
    client->request[client->used] = '\0';
    char *body = strstr(client->request, "\r\n\r\n");
    if (!body)
        return client->used < sizeof client->request - 1;
    body += 4;
    const char *length = strcasestr(client->request, "\r\ncontent-length:");
    size_t expected = length && length < body ? strtoul(strchr(length + 2, ':') + 1, NULL, 10) : 0;
    if (client->used - (body - client->request) < expected)
        return client->used < sizeof client->request - 1;
    client->used = 0;
    const char *close = strcasestr(client->request, "\r\nconnection: close");
    answer(client, body);
    return client->streams || client->left || !close || close >= body;
}

static void serve_client(struct client *client, uint32_t events)
{
    if (events & EPOLLOUT)
        send_bytes(client);
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || take_request(client))
        return;
    if (client->streams)
        leave_slot(client);
    close(client->fd);
    free(client);
}

static int source(const char *path)
{
    struct sockaddr_un address;
    int listening = unix_socket(path, &address);
    unlink(path);
    check(bind(listening, (struct sockaddr *)&address, sizeof address), path);
    check(listen(listening, 4096), "listen");
    check(chmod(path, 0660), "chmod");
    timer = check(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create");
    clients = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    watch(clients, EPOLL_CTL_ADD, listening, EPOLLIN, &listening);
    watch(clients, EPOLL_CTL_ADD, timer, EPOLLIN, &timer);
    for (;;) {
        struct epoll_event ready[READY_MAX];
        int number_ready = epoll_wait(clients, ready, READY_MAX, -1);
        for (int i = 0; i < number_ready; i++) {
            if (ready[i].data.ptr == &timer) {
                tick();
            } else if (ready[i].data.ptr == &listening) {
                int fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd < 0)
                    continue;
                struct client *client = calloc(1, sizeof *client);
                if (!client)
                    die("calloc");
                client->fd = fd;
                watch(clients, EPOLL_CTL_ADD, fd, EPOLLIN, client);
            } else {
                serve_client(ready[i].data.ptr, ready[i].events);
            }
        }
    }
}

/* The sink. */

#define SETTLE_NS (NS_PER_S / 2) /* after the last stream has begun */
#define RAMP_S 4                 /* at most, until all have begun, and settled */
#define LIMIT_S 30               /* beyond the measurement */
#define BUCKETS 1000000          /* one per microsecond */
#define FAULTS_SHOWN 5

struct histogram {
    uint32_t buckets[BUCKETS]; /* the last one is for all that is longer */
    uint64_t count;
    int64_t max_ns;
};

static void record(struct histogram *histogram, int64_t ns)
{
    int64_t bucket = ns / 1000;
    histogram->buckets[bucket < 0 ? 0 : bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    histogram->count++;
    if (ns > histogram->max_ns)
        histogram->max_ns = ns;
}

static int percentile(const struct histogram *histogram, double share)
{
    uint64_t rank = (uint64_t)(histogram->count * share), seen = 0;
    for (int bucket = 0; bucket < BUCKETS; bucket++)
        if ((seen += histogram->buckets[bucket]) > rank)
            return bucket;
    return 0;
}

enum place { HEAD, SIZE, SIZE_END, DATA, DATA_CR, DATA_END, LAST_CR, LAST_END, OVER };

struct stream {
    int fd;
    enum place place;
    size_t left;       /* of the chunk */
    int64_t events;    /* seen so far */
    bool done;         /* [DONE] was seen */
    size_t used;
    char text[2048];   /* the head, or the beginning of an event */
};

static struct histogram latencies, lates;
static struct stream *streams;
static int streams_wanted, streams_begun, streams_over, errors;
static int64_t events_wanted, begun_ns, from_ns, window_ns;
static enum { BEFORE, MEASURING, MEASURED } stage;

/* Ends the stream. `seen`: what is wrong with it. */
static void fault(struct stream *stream, const char *what, const char *seen)
{
    if (errors++ < FAULTS_SHOWN)
        fprintf(stderr, "streams: stream %td after %lld events: %s: %.500s\n", stream - streams, (long long)stream->events,
                what, seen);
    stream->place = OVER;
}

static void take_event(struct stream *stream, const char *text, int64_t now)
{
    if (text[0] == ':')
        return; /* the gateway may send comments */
    if (!strcmp(text, "data: [DONE]")) {
        if (stream->events != events_wanted || stream->done)
            fault(stream, "too early or too late", text);
        stream->done = true;
        return;
    }
    int64_t written = number(text, "\"t\":"), late = number(text, "\"late\":");
    if (stream->done || written < 0 || number(text, "\"n\":") != stream->events) {
        fault(stream, "not the event that comes next", text);
        return;
    }
    if (stream->events++ == 0 && ++streams_begun == streams_wanted)
        begun_ns = now;
    if (stage == MEASURING && written >= from_ns) {
        record(&latencies, now - written);
        record(&lates, late);
    }
}

static void take_content(struct stream *stream, const char *data, size_t size, int64_t now)
{
    while (size > 0 && stream->place != OVER) {
        size_t room = sizeof stream->text - stream->used, taken = size < room ? size : room;
        memcpy(stream->text + stream->used, data, taken);
        stream->used += taken, data += taken, size -= taken;
        char *event = stream->text, *end;
        while (stream->place != OVER && (end = memmem(event, stream->used, "\n\n", 2))) {
            *end = '\0';
            take_event(stream, event, now);
            stream->used -= end + 2 - event;
            event = end + 2;
        }
        memmove(stream->text, event, stream->used);
        if (stream->used == sizeof stream->text)
            fault(stream, "an event without end", "");
    }
}

static void take_head(struct stream *stream, char byte)
{
    stream->text[stream->used++] = byte;
    stream->text[stream->used] = '\0';
    if (byte == '\n' && strstr(stream->text, "\r\n\r\n")) {
        if (strncmp(stream->text, "HTTP/1.1 200 ", 13) || !strcasestr(stream->text, "\r\ntransfer-encoding: chunked\r\n"))
            fault(stream, "not the head of a stream", stream->text);
        else
            stream->place = SIZE;
        stream->used = 0;
    } else if (stream->used == sizeof stream->text - 1) {
        fault(stream, "a head without end", stream->text);
    }
}

static void take_size(struct stream *stream, char byte)
{
    const char *digits = "0123456789abcdef", *digit = memchr(digits, byte, 16);
    if (digit)
        stream->left = stream->left * 16 + (digit - digits);
    else if (byte == '\r')
        stream->place = SIZE_END;
    else
        fault(stream, "not a chunk's size", (char[]){byte, '\0'});
}

static void expect(struct stream *stream, char byte, char expected, enum place next)
{
    if (byte == expected)
        stream->place = next;
    else
        fault(stream, "not a chunk's end", (char[]){byte, '\0'});
}

static void take(struct stream *stream, const char *data, size_t size, int64_t now)
{
    for (const char *end = data + size; data < end;) {
        size_t piece = (size_t)(end - data) < stream->left ? (size_t)(end - data) : stream->left;
        switch (stream->place) {
        case HEAD:
            take_head(stream, *data++);
            break;
        case SIZE:
            take_size(stream, *data++);
            break;
        case SIZE_END:
            expect(stream, *data++, '\n', stream->left ? DATA : LAST_CR);
            break;
        case DATA:
            take_content(stream, data, piece, now);
            data += piece;
            if ((stream->left -= piece) == 0 && stream->place == DATA)
                stream->place = DATA_CR;
            break;
        case DATA_CR:
            expect(stream, *data++, '\r', DATA_END);
            break;
        case DATA_END:
            expect(stream, *data++, '\n', SIZE);
            break;
        case LAST_CR:
            expect(stream, *data++, '\r', LAST_END);
            break;
        case LAST_END:
            expect(stream, *data++, '\n', OVER);
            if (stream->place == OVER && !(stream->done && stream->used == 0 && data == end))
                fault(stream, "the last chunk came too early, or was not the last", "");
            break;
        case OVER:
            return;
        }
    }
}

static void read_stream(struct stream *stream)
{
    static char data[256 << 10];
    ssize_t got = recv(stream->fd, data, sizeof data, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        fault(stream, "closed before its end", got ? strerror(errno) : "");
    else
        take(stream, data, got, now_ns());
    if (stream->place == OVER) {
        close(stream->fd);
        streams_over++;
    }
}

static int connect_to(const char *endpoint)
{
    if (!strncmp(endpoint, "unix:", 5)) {
        struct sockaddr_un address;
        int fd = unix_socket(endpoint + 5, &address);
        check(connect(fd, (struct sockaddr *)&address, sizeof address), endpoint);
        return fd;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(endpoint))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = check(socket(AF_INET, SOCK_STREAM, 0), "socket");
    check(connect(fd, (struct sockaddr *)&address, sizeof address), endpoint);
    return fd;
}

static void ask(struct stream *stream, const char *model, int64_t phase_us)
{
    char body[512], request[1024];
    int size = snprintf(body, sizeof body,
                        "{\"model\":\"%s\",\"stream\":true,\"max_tokens\":%lld,\"phase_us\":%lld,"
                        "\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}",
                        model, (long long)events_wanted, (long long)phase_us);
    size = snprintf(request, sizeof request,
                    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    "Content-Length: %d\r\n\r\n%s",
                    size, body);
    if (send(stream->fd, request, size, MSG_NOSIGNAL) != size)
        die("send");
}

/* Begins and ends the measurement. */
static void look_at_clock(void)
{
    int64_t now = now_ns();
    if (stage == BEFORE && begun_ns && now >= begun_ns + SETTLE_NS) {
        stage = MEASURING;
        from_ns = now;
        puts("measuring");
    } else if (stage == MEASURING && now >= from_ns + window_ns) {
        stage = MEASURED;
        puts("measured");
    }
    fflush(stdout);
    if (stage != MEASURED && streams_over > 0 && !errors)
        fault(streams, "over before all were measured", "");
}

static int sink(const char *endpoint, const char *model, int wanted, int seconds, int batch)
{
    streams_wanted = wanted;
    events_wanted = (int64_t)RATE * (seconds + RAMP_S);
    window_ns = seconds * NS_PER_S;
    streams = calloc(wanted, sizeof *streams);
    if (!streams)
        die("calloc");
    int poll = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1"), batches = (wanted + batch - 1) / batch;
    for (int i = 0; i < wanted; i++) {
        streams[i].fd = connect_to(endpoint);
        watch(poll, EPOLL_CTL_ADD, streams[i].fd, EPOLLIN, &streams[i]);
        ask(&streams[i], model, (int64_t)(i / batch) * PERIOD_US / batches);
    }
    int64_t deadline = now_ns() + (seconds + LIMIT_S) * NS_PER_S;
    while (streams_over < wanted && now_ns() < deadline) {
        struct epoll_event ready[READY_MAX];
        int number_ready = epoll_wait(poll, ready, READY_MAX, 100);
        for (int i = 0; i < number_ready; i++)
            read_stream(ready[i].data.ptr);
        look_at_clock();
    }
    errors += wanted - streams_over;
    printf("{\"streams\": %d, \"count\": %llu, \"errors\": %d, \"p50\": %d, \"p99\": %d, \"p999\": %d, \"max\": %lld, "
           "\"late_p99\": %d, \"late_max\": %lld}\n",
           wanted, (unsigned long long)latencies.count, errors, percentile(&latencies, 0.5), percentile(&latencies, 0.99),
           percentile(&latencies, 0.999), (long long)latencies.max_ns / 1000, percentile(&lates, 0.99),
           (long long)lates.max_ns / 1000);
    return errors > 0;
}

int main(int argc, char **argv)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (argc == 3 && !strcmp(argv[1], "source"))
        return source(argv[2]);
    if (argc == 7 && !strcmp(argv[1], "sink") && atoi(argv[4]) > 0 && atoi(argv[6]) > 0)
        return sink(argv[2], argv[3], atoi(argv[4]), atoi(argv[5]), atoi(argv[6]));
    fprintf(stderr, "usage: %s source SOCKET | sink ENDPOINT MODEL STREAMS SECONDS BATCH\n", argv[0]);
    return 2;
}
