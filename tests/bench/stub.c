/* An engine that costs nothing: the other end of the gateway's benchmarks. One thread, epoll, HTTP/1.1 with keep-alive.
 *
 *   build   cc -O2 -o stub tests/bench/stub.c
 *   run     ./stub [--port N | --uds PATH] [--name MODEL]      without either: a free port
 *           prints "port N" or "socket PATH" once it listens; ends with SIGTERM
 *
 *   POST anything           689 bytes of JSON, at once. What the body says decides more (looked for in its first 48 KiB):
 *     "stream":true         SSE: "max_tokens" chunks of 215 bytes, 50 a second. The content of each is "t=NS n=N": when it
 *                           was written (CLOCK_MONOTONIC, nanoseconds) and its number. Streams that begin together do not
 *                           speak together, each gets its own phase; with "seed" all speak at once, as a batch does
 *     "user":"silent..."    no answer at all
 *     "user":"TAG"          GET /bench/requests tells of it
 *   GET /bench/requests     a line for each tagged request: TAG ARRIVED CLOSED, nanoseconds; CLOSED is when the peer left
 *                           before it had its answer, 0 while it has not
 *   GET /health, /v1/models, /metrics   as vLLM has them, as far as a supervisor or a router looks
 *
 *   curl -d '{"model":"bench","stream":true,"max_tokens":3,"messages":[]}' http://127.0.0.1:PORT/v1/chat/completions
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
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
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { IN = 64 << 10, LOOK = 48 << 10, HEAD = 16 << 10, BEHIND = 8 << 20, TAGGED = 4096, TAG = 40, PLAIN = 689, CHUNK = 215 };
static const uint64_t PERIOD = 20000000; /* nanoseconds between the chunks of a stream */

struct conn {
    int fd;
    size_t have;          /* bytes in `in` */
    size_t rest;          /* bytes of a large body still to come, thrown away */
    bool large, close;    /* such a body is under way; no keep-alive */
    bool busy;            /* a request without its whole answer */
    bool chatty;          /* the answer is a stream */
    struct tagged *tag;   /* NULL: nobody asks */
    char *out;            /* what the socket did not take yet */
    size_t out_have, out_sent;
    struct conn *before, *after; /* among streams, by `due` */
    uint64_t due;
    unsigned next, chunks;
    char in[IN];
};

static struct tagged {
    char name[TAG];
    uint64_t arrived, closed;
} tagged[TAGGED];
static unsigned tags;

static struct conn *first, *last; /* streams: who is due first */
static struct conn *dead;         /* freed after the round of events, which may still name them */
static int poller, timer;
static unsigned busy, streams;
static unsigned long long served, tokens;
static const char *name = "bench";
static char plain[1024], chunk[512], farewell[256];
static size_t plain_size, chunk_size, chunk_at, farewell_size; /* chunk_at: where the content is */
static volatile sig_atomic_t stop;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void on_term(int number) {
    (void)number;
    stop = 1;
}

/* -- answers made once ---------------------------------------------------------------------------------------------- */

static void make_answers(void) {
    char body[PLAIN + 1];
    int n = snprintf(body, sizeof body,
                     "{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1764000000,\"model\":\"%s\","
                     "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"", name);
    const char *end = "\",\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                      "\"usage\":{\"prompt_tokens\":200,\"total_tokens\":264,\"completion_tokens\":64}}";
    while (n < PLAIN - (int)strlen(end)) {
        body[n] = n % 6 ? 'a' : ' ';
        n++;
    }
    strcpy(body + n, end);
    plain_size = (size_t)sprintf(plain, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\n"
                                        "content-length: %d\r\n\r\n%s", PLAIN, body);
    char head[256];
    int h = snprintf(head, sizeof head,
                     "data: {\"id\":\"chatcmpl-01\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"%s\","
                     "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"", name);
    const char *tail = "\"},\"finish_reason\":null}]}\n\n";
    int content = CHUNK - h - (int)strlen(tail);
    if (content < 32)
        exit(fprintf(stderr, "--name is too long\n"));
    chunk_size = (size_t)sprintf(chunk, "%x\r\n%s%*s%s\r\n", CHUNK, head, content, "", tail);
    chunk_at = (size_t)(strstr(chunk, "\"content\":\"") - chunk) + 11;
    const char *stopped = "data: {\"id\":\"chatcmpl-01\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    farewell_size = (size_t)sprintf(farewell, "%zx\r\n%s\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", strlen(stopped), stopped);
}

/* -- writing -------------------------------------------------------------------------------------------------------- */

static void drop(struct conn *c);

static void watch(struct conn *c, bool write_too) {
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (write_too ? EPOLLOUT : 0u), .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e))
        die("epoll_ctl");
}

/* False: the connection is gone. */
static bool put(struct conn *c, const char *data, size_t size) {
    ssize_t n = c->out_have ? 0 : send(c->fd, data, size, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        drop(c);
        return false;
    }
    n = n < 0 ? 0 : n;
    if ((size_t)n == size)
        return true;
    if (c->out_have + size > BEHIND) {
        fprintf(stderr, "a reader is %d MiB behind: closed\n", BEHIND >> 20);
        drop(c);
        return false;
    }
    if (!c->out && !(c->out = malloc(BEHIND)))
        die("malloc");
    if (!c->out_have)
        watch(c, true);
    memcpy(c->out + c->out_have, data + n, size - (size_t)n);
    c->out_have += size - (size_t)n;
    return true;
}

static void put_more(struct conn *c) {
    ssize_t n = send(c->fd, c->out + c->out_sent, c->out_have - c->out_sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        drop(c);
        return;
    }
    c->out_sent += n < 0 ? 0 : (size_t)n;
    if (c->out_sent == c->out_have) {
        c->out_sent = c->out_have = 0;
        watch(c, false);
    }
}

static bool put_text(struct conn *c, const char *status, const char *kind, const char *text, size_t size) {
    char head[256];
    int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n",
                     status, kind, size);
    return put(c, head, (size_t)n) && put(c, text, size);
}

/* -- streams -------------------------------------------------------------------------------------------------------- */

static void arm(void) {
    struct itimerspec at = {0};
    uint64_t due = first ? first->due : 0;
    at.it_value.tv_sec = (time_t)(due / 1000000000u);
    at.it_value.tv_nsec = (long)(due % 1000000000u);
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
}

static void enqueue(struct conn *c) {
    struct conn *at = last; /* all have one period: who has just spoken is due last */
    while (at && at->due > c->due)
        at = at->before;
    c->before = at;
    c->after = at ? at->after : first;
    *(c->after ? &c->after->before : &last) = c;
    *(at ? &at->after : &first) = c;
}

static void unqueue(struct conn *c) {
    *(c->before ? &c->before->after : &first) = c->after;
    *(c->after ? &c->after->before : &last) = c->before;
    c->before = c->after = NULL;
}

static void finish(struct conn *c) {
    c->busy = c->chatty = false;
    c->tag = NULL;
    busy--;
    served++;
}

static void begin_stream(struct conn *c, unsigned chunks, bool in_step) {
    static const char head[] = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                               "transfer-encoding: chunked\r\n\r\n";
    c->chatty = true;
    c->next = 0;
    c->chunks = chunks;
    if (in_step)
        c->due = (now() / PERIOD + 2) * PERIOD;
    else /* the golden ratio spreads evenly */
        c->due = now() + PERIOD + streams++ * 61803399u % 100000000u * PERIOD / 100000000u;
    enqueue(c);
    if (first == c)
        arm();
    put(c, head, sizeof head - 1);
}

static void speak(struct conn *c) {
    unqueue(c);
    if (c->next < c->chunks) {
        char stamp[48];
        int n = snprintf(stamp, sizeof stamp, "t=%llu n=%u", (unsigned long long)now(), c->next++);
        memcpy(chunk + chunk_at, stamp, (size_t)n);
        tokens++;
        c->due += PERIOD;
        enqueue(c);
        put(c, chunk, chunk_size);
        memset(chunk + chunk_at, ' ', (size_t)n);
        return;
    }
    finish(c);
    if (put(c, farewell, farewell_size) && c->close)
        drop(c);
}

static void speak_all(void) {
    uint64_t expired;
    if (read(timer, &expired, sizeof expired) < 0 && errno != EAGAIN)
        die("timer");
    uint64_t until = now();
    while (first && first->due <= until)
        speak(first);
    if (first)
        arm();
}

/* -- requests ------------------------------------------------------------------------------------------------------- */

static void drop(struct conn *c) {
    if (c->fd < 0)
        return;
    if (c->tag)
        c->tag->closed = now();
    if (c->chatty)
        unqueue(c);
    if (c->busy)
        busy--;
    close(c->fd);
    free(c->out);
    c->out = NULL;
    c->fd = -1;
    c->after = dead;
    dead = c;
}

/* The value of "key" in a JSON text, at its first character; NULL when it is not there. */
static const char *value(const char *text, size_t size, const char *key) {
    char quoted[64];
    int n = snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *at = memmem(text, size, quoted, (size_t)n);
    if (!at)
        return NULL;
    at += n;
    return at < text + size && *at == ' ' ? at + 1 : at; /* a buffer ends with NUL, so it may be read here */
}

static bool tell_requests(struct conn *c) {
    size_t size = 0;
    char *text = malloc(TAGGED * (TAG + 48) + 1);
    if (!text)
        die("malloc");
    for (unsigned i = 0; i < (tags < TAGGED ? tags : TAGGED); i++)
        size += (size_t)sprintf(text + size, "%s %llu %llu\n", tagged[i].name, (unsigned long long)tagged[i].arrived,
                                (unsigned long long)tagged[i].closed);
    bool there = put_text(c, "200 OK", "text/plain", text, size);
    free(text);
    return there;
}

static bool answer_get(struct conn *c, const char *path) {
    char text[2048];
    int n = 0;
    const char *kind = "application/json", *status = "200 OK";
    if (!strncmp(path, "/bench/requests ", 16))
        return tell_requests(c);
    if (!strncmp(path, "/v1/models ", 11))
        n = snprintf(text, sizeof text, "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1764000000,"
                     "\"owned_by\":\"vllm\",\"root\":\"%s\",\"parent\":null,\"max_model_len\":4096}]}", name, name);
    else if (!strncmp(path, "/metrics ", 9)) {
        kind = "text/plain; version=0.0.4; charset=utf-8";
        const char *l = "{engine=\"0\",model_name=\"m\"}";
        n = snprintf(text, sizeof text,
                     "# from a stub\nvllm:num_requests_running%s %u\nvllm:num_requests_waiting%s 0\nvllm:kv_cache_usage_perc%s 0.1\n"
                     "vllm:generation_tokens_total%s %llu\nvllm:prompt_tokens_total%s %llu\nvllm:iteration_tokens_total_count%s %llu\n",
                     l, busy - 1, l, l, l, tokens + served, l, served, l, tokens + served);
    } else if (strncmp(path, "/health ", 8)) {
        status = "404 Not Found";
        n = snprintf(text, sizeof text, "{\"detail\":\"Not Found\"}");
    }
    return put_text(c, status, kind, text, (size_t)n);
}

static void note(struct conn *c, const char *user) {
    size_t n = strcspn(user, "\" ");
    if (n >= TAG || user[n] != '"')
        return;
    c->tag = &tagged[tags++ % TAGGED];
    memcpy(c->tag->name, user, n);
    c->tag->name[n] = 0;
    c->tag->arrived = now();
    c->tag->closed = 0;
}

/* False: the connection is gone, or has no request to be read now. */
static bool answer(struct conn *c, const char *body, size_t size) {
    c->busy = true;
    busy++;
    if (!strncmp(c->in, "GET ", 4)) {
        if (!answer_get(c, c->in + 4))
            return false;
    } else {
        const char *user = value(body, size, "user"), *stream = value(body, size, "stream");
        if (user && *user == '"')
            note(c, user + 1);
        if (user && !strncmp(user, "\"silent", 7))
            return false;
        if (stream && !strncmp(stream, "true", 4)) {
            const char *most = value(body, size, "max_tokens");
            begin_stream(c, most ? (unsigned)atoi(most) : 100, value(body, size, "seed") != NULL);
            return false;
        }
        if (!put(c, plain, plain_size))
            return false;
    }
    finish(c);
    if (c->close)
        drop(c);
    return c->fd >= 0;
}

/* The value of a header, or NULL. `head` ends with an empty line. */
static const char *header(const char *head, const char *name_) {
    size_t n = strlen(name_);
    for (const char *line = strstr(head, "\r\n"); line && line[2] != '\r'; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, name_, n) && line[2 + n] == ':')
            return line + 3 + n + strspn(line + 3 + n, " ");
    return NULL;
}

/* One request from the front of `in`. False: not all of it is there, or the connection is gone. */
static bool take(struct conn *c) {
    c->in[c->have] = 0;
    char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end) {
        if (c->have > HEAD)
            drop(c);
        return false;
    }
    char over = end[4];
    end[4] = 0;
    const char *length = header(c->in, "content-length"), *connection = header(c->in, "connection");
    size_t head = (size_t)(end - c->in) + 4, body = length ? strtoull(length, NULL, 10) : 0, whole = head + body;
    c->close = connection && !strncasecmp(connection, "close", 5);
    if (header(c->in, "transfer-encoding")) {
        put_text(c, "411 Length Required", "text/plain", "a stub reads no chunks\n", 23);
        drop(c);
        return false;
    }
    end[4] = over;
    if (whole > IN - 1 && c->have > LOOK) {
        c->rest = whole - c->have;
        c->large = true;
        return false;
    }
    if (c->have < whole)
        return false;
    bool more = answer(c, c->in + head, body);
    if (c->fd >= 0) {
        memmove(c->in, c->in + whole, c->have - whole);
        c->have -= whole;
    }
    return more && c->have;
}

static void hear(struct conn *c) {
    while (c->fd >= 0) {
        static char away[256 << 10];
        ssize_t n = c->large ? recv(c->fd, away, c->rest < sizeof away ? c->rest : sizeof away, 0)
                             : recv(c->fd, c->in + c->have, IN - 1 - c->have, 0);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            drop(c);
            return;
        }
        if (c->large) {
            if ((c->rest -= (size_t)n))
                continue;
            char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
            c->large = false;
            size_t have = c->have;
            answer(c, end + 4, have - (size_t)(end + 4 - c->in));
            c->have = 0;
            return;
        }
        c->have += (size_t)n;
        while (!c->busy && take(c))
            continue;
        if (c->fd >= 0 && !c->large && c->have < IN - 1)
            return; /* epoll says when there is more */
    }
}

/* -- listening ------------------------------------------------------------------------------------------------------ */

static int listen_on(const char *path, int port) {
    int fd = socket(path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof inet;
    if (path)
        strncpy(local.sun_path, path, sizeof local.sun_path - 1);
    else
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (fd < 0 || (path ? bind(fd, (void *)&local, sizeof local) : bind(fd, (void *)&inet, sizeof inet)) || listen(fd, 4096))
        die("listen");
    if (path)
        printf("socket %s\n", path);
    else if (!getsockname(fd, (void *)&inet, &size))
        printf("port %d\n", ntohs(inet.sin_port));
    fflush(stdout);
    return fd;
}

static void welcome(int listener, bool tcp) {
    int fd, yes = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct conn *c = malloc(sizeof *c);
        if (!c)
            die("malloc");
        memset(c, 0, offsetof(struct conn, in));
        c->fd = fd;
        if (tcp)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e))
            die("epoll_ctl");
    }
}

static void on_event(struct epoll_event *e) {
    struct conn *c = e->data.ptr;
    if (c->fd >= 0 && e->events & EPOLLOUT)
        put_more(c);
    if (c->fd >= 0 && c->busy && e->events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        drop(c); /* who has asked and hangs up does not want the answer */
    else if (c->fd >= 0 && e->events & ~(uint32_t)EPOLLOUT)
        hear(c);
}

static void serve(int listener, bool tcp) {
    static struct epoll_event events[1024];
    while (!stop) {
        int n = epoll_wait(poller, events, 1024, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &timer)
                speak_all();
            else if (events[i].data.ptr == &poller) /* stands for the listener */
                welcome(listener, tcp);
            else
                on_event(&events[i]);
        }
        while (dead) {
            struct conn *c = dead;
            dead = c->after;
            free(c);
        }
    }
}

int main(int count, char **words) {
    const char *path = NULL;
    int port = 0;
    for (int i = 1; i < count; i += 2) {
        if (i + 1 == count)
            exit(fprintf(stderr, "%s needs a value\n", words[i]));
        if (!strcmp(words[i], "--port"))
            port = atoi(words[i + 1]);
        else if (!strcmp(words[i], "--uds"))
            path = words[i + 1];
        else if (!strcmp(words[i], "--name"))
            name = words[i + 1];
        else
            exit(fprintf(stderr, "there is no %s; see the top of stub.c\n", words[i]));
    }
    struct sigaction term = {.sa_handler = on_term};
    sigaction(SIGTERM, &term, NULL);
    make_answers();
    poller = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int listener = listen_on(path, port);
    struct epoll_event hear_them = {.events = EPOLLIN, .data.ptr = &poller}, tick = {.events = EPOLLIN, .data.ptr = &timer};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &hear_them) || epoll_ctl(poller, EPOLL_CTL_ADD, timer, &tick))
        die("epoll_ctl");
    serve(listener, !path);
    if (path)
        unlink(path);
    return 0;
}
