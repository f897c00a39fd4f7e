/* Clients for the gateway's benchmarks: many connections in one thread, each answer checked, each time kept.
 *
 *   build   cc -O2 -o load tests/bench/load.c
 *   run     ./load plain  PORT [--connections 32] [--seconds 5] [--warm 0.5] [--body 1024]
 *           ./load stream PORT [--connections 64] [--chunks 400] [--step 1]
 *           both: [--model bench] [--key SECRET] [--path /v1/chat/completions]
 *
 * plain: each connection asks again as soon as it was answered. stream: each asks once, for a stream, and counts its
 * chunks (those that stub.c writes; with --step those of all streams come together); all connect at once. Only to 127.0.0.1. Ends with one line of JSON, times in seconds:
 *   requests, seconds     answered after the warm-up, and how long that was
 *   chunks                read
 *   all                   answered in all, with those of the warm-up: what the CPU of a proxy has to be divided by
 *   errors, error         answers that were not 200, cut, not the stub's, chunks lost; the first of them
 *   p50, p99, max         plain: of a request. stream: of a chunk, from stub.c's stamp until it was read here
 *   connect, first        the longest wait for a connection; for the head of the answer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 16 << 10, LINE = 4 << 10, AT_MOST = 4096, PLAIN = 689 /* bytes of stub.c's answer */ };
enum where { IN_HEAD, IN_BODY, IN_SIZE, IN_CHUNK, AFTER_CHUNK, IN_TRAILER };
static const uint64_t PATIENCE = 20000000000u; /* nanoseconds without any event, after which we give up */

struct conn {
    int fd;
    bool connected, done;
    uint64_t began;      /* the connect, then each request */
    size_t sent;
    enum where where;
    size_t rest, length; /* of the body or chunk; of the whole body */
    unsigned size;       /* a chunk's size while it is read */
    unsigned next;       /* the number of the next chunk of the stream */
    bool ended;          /* [DONE] was seen */
    size_t have;
    char text[HEAD];     /* of the head, or of a line of the stream */
};

static bool streaming, in_step;
static int port, connections = 0, chunks = 400, poller, left;
static double seconds = 5, warm = 0.5;
static size_t body = 1024, request_size;
static const char *model = "bench", *key = "", *path = "/v1/chat/completions";
static char *request, error[200];
static uint64_t count_from, until, connect_worst, first_worst;
static unsigned long long all, errors;
static uint64_t *times;
static size_t timed, room;
static struct sockaddr_in address = {.sin_family = AF_INET};

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void keep_time(uint64_t took) {
    if (timed == room && !(times = realloc(times, (room = room ? room * 2 : 1 << 20) * sizeof *times)))
        die("realloc");
    times[timed++] = took;
}

/* -- the request ---------------------------------------------------------------------------------------------------- */

static void make_request(void) {
    char front[512], head[1024];
    int n = snprintf(front, sizeof front, "{\"model\":\"%s\",\"max_tokens\":%d,%s\"messages\":[{\"role\":\"user\",\"content\":\"", model,
                     chunks, streaming ? in_step ? "\"seed\":1,\"stream\":true," : "\"stream\":true," : "");
    const char *end = "\"}]}";
    size_t least = (size_t)n + strlen(end);
    body = body < least ? least : body;
    int h = snprintf(head, sizeof head,
                     "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nAccept: */*\r\n"
                     "User-Agent: vllmd-bench\r\nContent-Length: %zu\r\n%s%s%s\r\n",
                     path, port, body, *key ? "Authorization: Bearer " : "", key, *key ? "\r\n" : "");
    request_size = (size_t)h + body;
    if (!(request = malloc(request_size + 1)))
        die("malloc");
    memcpy(request, head, (size_t)h);
    memset(request + h, 'a', body);
    memcpy(request + h, front, (size_t)n);
    strcpy(request + request_size - strlen(end), end);
}

/* -- a connection --------------------------------------------------------------------------------------------------- */

static void watch(struct conn *c, int how, uint32_t what) {
    struct epoll_event e = {.events = what, .data.ptr = c};
    if (epoll_ctl(poller, how, c->fd, &e))
        die("epoll_ctl");
}

static void open_one(struct conn *c) {
    int yes = 1;
    memset(c, 0, offsetof(struct conn, text));
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    c->began = now();
    if (c->fd < 0 || (connect(c->fd, (void *)&address, sizeof address) && errno != EINPROGRESS))
        die("connect");
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void close_one(struct conn *c) {
    close(c->fd);
    c->done = true;
    left--;
}

/* Counts the error; the connection is replaced while there is time. Always false: nothing more is to be read. */
static bool wrong(struct conn *c, const char *what) {
    if (!errors++)
        snprintf(error, sizeof error, "%s", what);
    close_one(c);
    if (!streaming && errors < 1000 && now() < until) {
        left++;
        open_one(c);
    }
    return false;
}

static void send_some(struct conn *c) {
    ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        wrong(c, strerror(errno));
        return;
    }
    size_t before = c->sent;
    c->sent += n < 0 ? 0 : (size_t)n;
    if (c->sent < request_size && !before)
        watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    else if (c->sent == request_size && before)
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void ask(struct conn *c) {
    c->sent = c->have = 0;
    c->where = IN_HEAD;
    c->length = 0;
    c->began = now();
    send_some(c);
}

static void connected(struct conn *c) {
    int failed = 0;
    socklen_t size = sizeof failed;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &failed, &size);
    if (failed) {
        wrong(c, strerror(failed));
        return;
    }
    uint64_t took = now() - c->began;
    connect_worst = took > connect_worst ? took : connect_worst;
    c->connected = true;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    ask(c);
}

/* -- answers -------------------------------------------------------------------------------------------------------- */

/* False: the connection is closed, or was asked anew. */
static bool answered(struct conn *c) {
    uint64_t at = now();
    all++;
    if (streaming) {
        if (!c->ended || c->next != (unsigned)chunks)
            return wrong(c, "a stream ended early");
        close_one(c);
        return false;
    }
    if (c->length != PLAIN)
        return wrong(c, "an answer of another length");
    if (at >= until) {
        close_one(c);
        return false;
    }
    if (at >= count_from)
        keep_time(at - c->began);
    ask(c);
    return false; /* nothing can be there yet */
}

/* A whole line of a stream, ended by NUL. */
static bool read_line(struct conn *c, uint64_t at) {
    if (strncmp(c->text, "data: ", 6))
        return true; /* empty, or a comment */
    if (!strcmp(c->text + 6, "[DONE]")) {
        c->ended = true;
        return true;
    }
    const char *stamp = strstr(c->text, "\"t="), *number = stamp ? strstr(stamp, " n=") : NULL;
    if (!number)
        return strstr(c->text, "\"error\"") ? wrong(c, c->text) : true;
    if (strtoul(number + 3, NULL, 10) != c->next++)
        return wrong(c, "a chunk is missing");
    keep_time(at - strtoull(stamp + 3, NULL, 10));
    return true;
}

static bool read_text(struct conn *c, const char *data, size_t size, uint64_t at) {
    while (size) {
        const char *end = memchr(data, '\n', size);
        size_t n = end ? (size_t)(end - data) : size;
        if (c->have + n >= LINE)
            return wrong(c, "a line is too long");
        memcpy(c->text + c->have, data, n);
        c->have += n;
        if (!end)
            return true;
        c->text[c->have] = 0;
        c->have = 0;
        if (!read_line(c, at))
            return false;
        data += n + 1;
        size -= n + 1;
    }
    return true;
}

static const char *header(const char *head, const char *name) {
    size_t n = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line && line[2] != '\r'; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, name, n) && line[2 + n] == ':')
            return line + 3 + n + strspn(line + 3 + n, " ");
    return NULL;
}

/* The head is whole. */
static bool read_head(struct conn *c, uint64_t at) {
    uint64_t took = at - c->began;
    first_worst = took > first_worst ? took : first_worst;
    if (strncmp(c->text, "HTTP/1.1 200 ", 13)) {
        c->text[strcspn(c->text, "\r")] = 0;
        return wrong(c, c->text);
    }
    const char *length = header(c->text, "content-length"), *coding = header(c->text, "transfer-encoding");
    c->where = length ? IN_BODY : IN_SIZE;
    c->rest = c->length = length ? strtoull(length, NULL, 10) : 0;
    c->size = 0;
    c->have = 0;
    if (!length && (!coding || strncasecmp(coding, "chunked", 7)))
        return wrong(c, "an answer without a length");
    return true;
}

static bool read_size(struct conn *c, char each) {
    if (each == '\n') {
        c->where = c->size ? IN_CHUNK : IN_TRAILER;
        c->rest = c->size;
        c->length += c->size;
        c->size = 0;
        c->have = c->rest ? c->have : 0;
    } else if (each != '\r') {
        c->size = c->size * 16 + (unsigned)(each <= '9' ? each - '0' : (each | 32) - 'a' + 10);
    }
    return true;
}

/* Reads on at `data`; 0: the connection is closed or was asked anew. */
static size_t read_part(struct conn *c, const char *data, size_t size, uint64_t at) {
    size_t n = 1;
    switch (c->where) {
    case IN_HEAD:
        if (c->have == HEAD - 1)
            return wrong(c, "a head is too long");
        c->text[c->have++] = *data;
        c->text[c->have] = 0;
        return c->have < 4 || memcmp(c->text + c->have - 4, "\r\n\r\n", 4) || read_head(c, at);
    case IN_SIZE:
        return read_size(c, *data);
    case IN_BODY:
    case IN_CHUNK:
        n = size < c->rest ? size : c->rest;
        c->rest -= n;
        if (streaming && !read_text(c, data, n, at))
            return 0;
        if (!c->rest && c->where == IN_BODY)
            return answered(c);
        if (!c->rest)
            c->where = AFTER_CHUNK;
        return n;
    case AFTER_CHUNK:
        c->where = *data == '\n' ? IN_SIZE : AFTER_CHUNK;
        return 1;
    case IN_TRAILER: /* none is ever sent: the empty line */
        return *data == '\n' ? answered(c) : 1;
    }
    return n;
}

static void hear(struct conn *c) {
    static char data[256 << 10];
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        wrong(c, n ? strerror(errno) : "the connection was closed");
        return;
    }
    uint64_t at = now();
    for (size_t i = 0, took; i < (size_t)n; i += took)
        if (!(took = read_part(c, data + i, (size_t)n - i, at)))
            return;
}

/* -- all ------------------------------------------------------------------------------------------------------------ */

static void converse(struct conn *conns) {
    static struct epoll_event events[AT_MOST];
    uint64_t began = now();
    count_from = began + (uint64_t)(warm * 1e9);
    until = count_from + (uint64_t)(seconds * 1e9);
    left = connections;
    for (int i = 0; i < connections; i++)
        open_one(&conns[i]);
    while (left > 0) {
        int n = epoll_wait(poller, events, AT_MOST, (int)(PATIENCE / 1000000));
        if (!n) {
            errors += (unsigned)left;
            snprintf(error, sizeof error, "%d connections got no answer", left);
            return;
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c->done && !c->connected)
                connected(c);
            else if (!c->done && events[i].events & EPOLLOUT)
                send_some(c);
            else if (!c->done)
                hear(c);
        }
    }
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The nearest rank. */
static double at_most(double part) {
    return timed ? (double)times[(size_t)(part * (double)(timed - 1) + 0.5)] / 1e9 : 0;
}

static void report(void) {
    qsort(times, timed, sizeof *times, by_size);
    for (char *each = error; *each; each++)
        if (*each == '"' || *each == '\\' || (unsigned char)*each < ' ')
            *each = '\'';
    printf("{\"requests\": %llu, \"chunks\": %zu, \"all\": %llu, \"errors\": %llu, \"error\": \"%s\", "
           "\"seconds\": %.3f, \"p50\": %.7f, \"p99\": %.7f, \"max\": %.7f, \"connect\": %.7f, \"first\": %.7f}\n",
           streaming ? all : (unsigned long long)timed, streaming ? timed : 0, all, errors, error,
           streaming ? (double)(now() - count_from) / 1e9 : seconds, at_most(0.5), at_most(0.99), at_most(1.0),
           (double)connect_worst / 1e9, (double)first_worst / 1e9);
}

static void read_words(int count, char **words) {
    if (count < 3 || (strcmp(words[1], "plain") && strcmp(words[1], "stream")))
        exit(fprintf(stderr, "load plain|stream PORT [...]; see the top of load.c\n"));
    streaming = !strcmp(words[1], "stream");
    port = atoi(words[2]);
    connections = streaming ? 64 : 32;
    warm = streaming ? 0 : warm;
    for (int i = 3; i < count; i += 2) {
        const char *word = words[i], *value = i + 1 < count ? words[i + 1] : "";
        if (!strcmp(word, "--connections"))
            connections = atoi(value);
        else if (!strcmp(word, "--seconds"))
            seconds = atof(value);
        else if (!strcmp(word, "--warm"))
            warm = atof(value);
        else if (!strcmp(word, "--body"))
            body = strtoull(value, NULL, 10);
        else if (!strcmp(word, "--chunks"))
            chunks = atoi(value);
        else if (!strcmp(word, "--step"))
            in_step = atoi(value);
        else if (!strcmp(word, "--model"))
            model = value;
        else if (!strcmp(word, "--key"))
            key = value;
        else if (!strcmp(word, "--path"))
            path = value;
        else
            exit(fprintf(stderr, "there is no %s; see the top of load.c\n", word));
    }
}

int main(int count, char **words) {
    read_words(count, words);
    make_request();
    poller = epoll_create1(EPOLL_CLOEXEC);
    address.sin_port = htons((uint16_t)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct conn *conns = calloc((size_t)connections, sizeof *conns);
    if (!conns || connections < 1 || connections > AT_MOST)
        die("connections");
    converse(conns);
    report();
    return 0;
}
