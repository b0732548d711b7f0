// Both ends of an HTTP router under test, each one thread with epoll, so that they cost little beside it.
//
//   http_mock serve PORT STEP_US             a worker with OpenAI's streaming API: a token per step for all its requests
//   http_mock load PORT CONNECTIONS SECONDS RATE BODIES
//                                            RATE 0: each connection asks again at once; else requests are due RATE
//                                            times a second, and time counts from when they were due
//
// BODIES: files of JSON bodies, each after its length in bytes and a newline; they are sent in turn. `load` writes one
// line of JSON. A worker that ends (SIGTERM) writes how long requests waited for their first token, as it saw it.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "http_mock: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

void no_delay(int fd) {
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

sockaddr_in local(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

double part_of(std::vector<double>& sorted, double share) {
  return sorted.empty() ? 0.0 : sorted[std::min(sorted.size() - 1, static_cast<size_t>(share * sorted.size()))];
}

std::string percentiles(const char* name, std::vector<double>& seconds) {
  std::sort(seconds.begin(), seconds.end());
  char text[128];
  std::snprintf(text, sizeof text, "\"%s_p50_ms\": %.3f, \"%s_p99_ms\": %.3f", name, 1e3 * part_of(seconds, 0.5), name,
                1e3 * part_of(seconds, 0.99));
  return text;
}

void watch(int poll, int fd, uint32_t events, int how = EPOLL_CTL_ADD) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (epoll_ctl(poll, how, fd, &event) < 0) fail("epoll_ctl");
}

// -- the worker ------------------------------------------------------------------------------------------

struct Answer {
  int fd;
  int left;
  bool stream;
  double asked;
  bool begun = false;
};

struct Peer {
  std::string in, out;
};

volatile sig_atomic_t stopping = 0;

std::string chunk(const std::string& data) {
  char size[16];
  std::snprintf(size, sizeof size, "%zx\r\n", data.size());
  return size + data + "\r\n";
}

const char* const EVENT =
    "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"finish_reason\":null}]}\n\n";
const char* const LAST =
    "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n";

// vllm-router's cache_aware asks every worker for the tokens of every request, as vLLM's render them.
const std::string RENDERED = [] {
  std::string ids;
  for (int i = 0; i < 512; i++) ids += (i ? "," : "") + std::to_string(1000 + i);
  return "{\"request_id\":\"chatcmpl-0\",\"token_ids\":[" + ids + "],\"features\":null,\"sampling_params\":{}}";
}();

class Worker {
 public:
  Worker(int port, int step_us) : listener_(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)), poll_(epoll_create1(0)) {
    int one = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    auto address = local(port);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) fail("bind");
    if (listen(listener_, 1024) < 0) fail("listen");
    timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    itimerspec every{};
    every.it_interval.tv_nsec = every.it_value.tv_nsec = 1000L * step_us;
    timerfd_settime(timer_, 0, &every, nullptr);
    watch(poll_, listener_, EPOLLIN);
    watch(poll_, timer_, EPOLLIN);
  }

  void run() {
    epoll_event events[256];
    while (!stopping) {
      int count = epoll_wait(poll_, events, 256, 100);
      for (int i = 0; i < count; i++) {
        int fd = events[i].data.fd;
        if (fd == listener_) {
          greet();
        } else if (fd == timer_) {
          uint64_t ticks;
          if (read(timer_, &ticks, sizeof ticks) == sizeof ticks) step();
        } else if (events[i].events & EPOLLOUT) {
          send(fd);
        } else {
          hear(fd);
        }
      }
    }
    std::printf("{\"answers\": %zu, %s}\n", waits_.size(), percentiles("first_token", waits_).c_str());
  }

 private:
  void greet() {
    int fd;
    while ((fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK)) >= 0) {
      no_delay(fd);
      peers_[fd] = {};
      watch(poll_, fd, EPOLLIN);
    }
  }

  void hear(int fd) {
    char buffer[65536];
    auto& peer = peers_[fd];
    ssize_t got;
    while ((got = recv(fd, buffer, sizeof buffer, 0)) > 0) peer.in.append(buffer, static_cast<size_t>(got));
    if (got == 0 || (got < 0 && errno != EAGAIN)) return drop(fd);
    while (take(fd, peer)) {
    }
  }

  bool take(int fd, Peer& peer) {
    size_t end = peer.in.find("\r\n\r\n");
    if (end == std::string::npos) return false;
    std::string head = peer.in.substr(0, end);
    std::transform(head.begin(), head.end(), head.begin(), [](unsigned char c) { return std::tolower(c); });
    size_t at = head.find("content-length:");
    size_t length = at == std::string::npos ? 0 : std::strtoul(head.c_str() + at + 15, nullptr, 10);
    if (peer.in.size() < end + 4 + length) return false;
    std::string body = peer.in.substr(end + 4, length);
    peer.in.erase(0, end + 4 + length);
    if (head.rfind("post /v1/chat/completions/render ", 0) == 0) {
      reply(fd, RENDERED);
    } else if (head.rfind("post ", 0) == 0) {
      size_t wanted = std::string::npos;
      for (const char* name : {"\"max_tokens\":", "\"max_completion_tokens\":"})  // sglang-router says the latter
        if (wanted == std::string::npos && (wanted = body.rfind(name)) != std::string::npos) wanted += std::strlen(name);
      int tokens = wanted == std::string::npos ? 16 : std::atoi(body.c_str() + wanted);
      bool stream = body.find("\"stream\":true") != std::string::npos || body.find("\"stream\": true") != std::string::npos;
      answers_.push_back({fd, tokens, stream, now()});
    } else {
      reply(fd, "{\"status\":\"ok\",\"object\":\"list\",\"model_path\":\"bench\",\"data\":[{\"id\":\"bench\",\"object\":\"model\"}]}");
    }
    return true;
  }

  void reply(int fd, const std::string& body) {
    peers_[fd].out += "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: " +
                      std::to_string(body.size()) + "\r\n\r\n" + body;
    send(fd);
  }

  void step() {
    size_t kept = 0;
    for (size_t i = 0; i < answers_.size(); i++) {
      Answer answer = answers_[i];
      auto peer = peers_.find(answer.fd);
      if (peer == peers_.end()) continue;
      answer.left--;
      if (!answer.begun) {
        waits_.push_back(now() - answer.asked);
        if (answer.stream)
          peer->second.out +=
              "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        answer.begun = true;
      }
      if (answer.stream) {
        peer->second.out += chunk(EVENT);
        if (!answer.left) peer->second.out += chunk(LAST) + "0\r\n\r\n";
        send(answer.fd);
      } else if (!answer.left) {
        reply(answer.fd, "{\"id\":\"chatcmpl-0\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"bench\","
                         "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\" token\"},"
                         "\"finish_reason\":\"length\"}]}");
      }
      if (answer.left) answers_[kept++] = answer;
    }
    answers_.resize(kept);
  }

  void send(int fd) {
    auto found = peers_.find(fd);
    if (found == peers_.end()) return;
    auto& out = found->second.out;
    ssize_t sent = out.empty() ? 0 : ::send(fd, out.data(), out.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return drop(fd);
    if (sent > 0) out.erase(0, static_cast<size_t>(sent));
    watch(poll_, fd, out.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
  }

  void drop(int fd) {
    peers_.erase(fd);
    close(fd);
  }

  int listener_, poll_, timer_;
  std::unordered_map<int, Peer> peers_;
  std::vector<Answer> answers_;
  std::vector<double> waits_;
};

// -- the load --------------------------------------------------------------------------------------------

struct Connection {
  int fd = -1;
  bool busy = false;
  double due = 0.0, first = 0.0;
  std::string in;
  size_t scanned = 0;  // of `in`
};

std::vector<std::string> read_bodies(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path);
  std::vector<std::string> bodies;
  size_t length;
  while (file >> length) {
    file.get();
    std::string body(length, '\0');
    file.read(body.data(), static_cast<std::streamsize>(length));
    bodies.push_back(std::move(body));
  }
  if (bodies.empty()) fail("no bodies");
  return bodies;
}

class Load {
 public:
  Load(int port, int connections, double seconds, double rate, const char* path)
      : bodies_(read_bodies(path)), poll_(epoll_create1(0)), rate_(rate), connections_(static_cast<size_t>(connections)) {
    auto address = local(port);
    for (size_t i = 0; i < connections_.size(); i++) {
      int fd = socket(AF_INET, SOCK_STREAM, 0);
      if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) fail("connect");
      fcntl(fd, F_SETFL, O_NONBLOCK);
      no_delay(fd);
      connections_[i].fd = fd;
      epoll_event event{};
      event.events = EPOLLIN;
      event.data.u64 = i;
      epoll_ctl(poll_, EPOLL_CTL_ADD, fd, &event);
      idle_.push_back(i);
    }
    began_ = now();
    ends_ = began_ + seconds;
  }

  void run() {
    epoll_event events[256];
    double next = began_;
    while (true) {
      double t = now();
      if (t < ends_) {
        if (rate_ > 0) {
          for (; next <= t; next += 1.0 / rate_) waiting_.push_back(next);
          while (!waiting_.empty() && !idle_.empty()) {
            ask(idle_.back(), waiting_.front());
            idle_.pop_back();
            waiting_.pop_front();
          }
        } else {
          for (; !idle_.empty(); idle_.pop_back()) ask(idle_.back(), t);
        }
      } else if (idle_.size() == connections_.size() || t > ends_ + 10.0) {
        break;
      }
      rest(rate_ > 0 && now() < ends_ ? std::min(next - now(), 0.1) : 0.1);
      int count = epoll_wait(poll_, events, 256, 0);
      for (int i = 0; i < count; i++) hear(events[i].data.u64);
    }
    double seconds = last_ - began_;
    std::printf("{\"requests\": %zu, \"failed\": %zu, \"events\": %zu, \"unsent\": %zu, \"seconds\": %.3f, %s, %s}\n",
                first_.size(), failed_, events_, waiting_.size(), seconds, percentiles("first", first_).c_str(),
                percentiles("whole", whole_).c_str());
  }

 private:
  // Until something arrives or the time is over, to the microsecond: a loop that spins instead takes its core from the
  // worker beside it.
  void rest(double seconds) const {
    long ns = std::max(0L, static_cast<long>(1e9 * seconds));
    timespec time{ns / 1000000000, ns % 1000000000};
    pollfd ready{poll_, POLLIN, 0};
    ppoll(&ready, 1, &time, nullptr);
  }

  void ask(size_t index, double due) {
    auto& c = connections_[index];
    const auto& body = bodies_[sent_++ % bodies_.size()];
    std::string request =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: " +
        std::to_string(body.size()) + "\r\n\r\n" + body;
    c.busy = true;
    c.due = due;
    c.first = 0.0;
    c.in.clear();
    c.scanned = 0;
    size_t done = 0;
    while (done < request.size()) {
      ssize_t sent = send(c.fd, request.data() + done, request.size() - done, MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN) fail("send");
      if (sent > 0) done += static_cast<size_t>(sent);
    }
  }

  void hear(size_t index) {
    auto& c = connections_[index];
    char buffer[65536];
    ssize_t got = recv(c.fd, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) fail("the router closed a connection");
    c.in.append(buffer, static_cast<size_t>(got));
    static const std::string TEXT = "\"content\":\"";
    size_t at;
    while ((at = c.in.find(TEXT, c.scanned)) != std::string::npos && at + TEXT.size() < c.in.size()) {
      c.scanned = at + TEXT.size();
      if (c.in[c.scanned] == '"') continue;  // an empty one: the role's event
      if (c.first == 0.0) c.first = now();
      events_++;
    }
    bool refused = c.in.size() > 12 && c.in.compare(9, 3, "200") != 0;
    bool over = c.in.size() > 5 && c.in.compare(c.in.size() - 5, 5, "0\r\n\r\n") == 0;
    if (!over && refused) over = c.in.back() == '}';
    if (!over) return;
    if (refused) {
      if (!failed_++) std::fprintf(stderr, "%s\n", c.in.substr(0, 600).c_str());
    } else {
      last_ = now();
      first_.push_back(c.first - c.due);
      whole_.push_back(last_ - c.due);
    }
    c.busy = false;
    idle_.push_back(index);
  }

  std::vector<std::string> bodies_;
  int poll_;
  double rate_, began_ = 0.0, ends_ = 0.0, last_ = 0.0;
  std::vector<Connection> connections_;
  std::vector<size_t> idle_;
  std::deque<double> waiting_;
  std::vector<double> first_, whole_;
  size_t sent_ = 0, events_ = 0, failed_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  std::string mode = argc > 1 ? argv[1] : "";
  signal(SIGTERM, [](int) { stopping = 1; });
  if (mode == "serve" && argc == 4) {
    Worker(std::atoi(argv[2]), std::atoi(argv[3])).run();
  } else if (mode == "load" && argc == 7) {
    Load(std::atoi(argv[2]), std::atoi(argv[3]), std::atof(argv[4]), std::atof(argv[5]), argv[6]).run();
  } else {
    std::fprintf(stderr, "http_mock serve PORT STEP_US | load PORT CONNECTIONS SECONDS RATE BODIES\n");
    return 2;
  }
}
