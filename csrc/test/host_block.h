// A block of threads, emulated: threads take turns within each(), in an order of choice, and a value that one
// thread wrote and another uses without a barrier between them is an error, as is one overwritten so.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace adalora_fast {

struct Race : std::logic_error {
    Race() : std::logic_error("a thread reads or overwrites what another wrote or read before a barrier") {}
};

enum class Order { forward, backward, scattered };

template <int COUNT>
struct HostBlock {
    static constexpr int THREADS = COUNT;
    Order order;

    explicit HostBlock(Order order) : order(order) { epoch() = 1; }

    template <typename V>
    struct Register {
        std::vector<V> values;
        explicit Register(const HostBlock&) : values(COUNT) {}
        typename std::vector<V>::reference operator[](int t) { return values[t]; }
        typename std::vector<V>::const_reference operator[](int t) const { return values[t]; }
    };

    // Memory that notes who wrote and who read each entry since the last barrier.
    template <typename V>
    struct Noted {
        static constexpr int NOBODY = -1, SEVERAL = -2;
        struct Entry {
            int epoch = 0, writer = NOBODY, reader = NOBODY;
            bool added = false;
        };
        V* data = nullptr;
        std::vector<Entry> entries;

        Entry& entry(int i) {
            Entry& found = entries.at(i);
            if (found.epoch != epoch()) found = {epoch(), NOBODY, NOBODY, false};
            return found;
        }
        V get(int i, int t) {
            Entry& now = entry(i);
            if (now.writer != NOBODY && now.writer != t) throw Race();
            now.reader = now.reader == NOBODY || now.reader == t ? t : SEVERAL;
            return data[i];
        }
        void set(int i, V value, int t) {
            Entry& now = entry(i);
            if (now.added || (now.writer != NOBODY && now.writer != t)) throw Race();
            if (now.reader != NOBODY && now.reader != t) throw Race();
            now.writer = t;
            data[i] = value;
        }
        void add(int i, V value, int t) {  // atomic: any number of threads may, in any order
            Entry& now = entry(i);
            if ((!now.added && now.writer != NOBODY && now.writer != t) || now.reader != NOBODY) throw Race();
            now.added = true;
            now.writer = now.writer == NOBODY || now.writer == t ? t : SEVERAL;
            data[i] += value;
        }
    };

    template <typename V, int N>
    struct Shared : Noted<V> {
        std::vector<V> own = std::vector<V>(N, V(-77));  // as unset as shared memory is
        Shared() {
            this->data = own.data();
            this->entries.resize(N);
        }
    };

    template <typename V>
    struct Global : Noted<V> {
        Global(V* data, int count) {
            this->data = data;
            this->entries.resize(count);
        }
    };

    template <typename F>
    void each(const F& f) const {
        for (int n = 0; n < COUNT; ++n) {
            f(order == Order::forward ? n : order == Order::backward ? COUNT - 1 - n : n * 37 % COUNT);
        }
    }

    void barrier() const { ++epoch(); }

    template <class Memory>
    int same_for_all(Memory& memory, int i) const {
        for (int t = 1; t < COUNT; ++t) memory.get(i, t);
        return memory.get(i, 0);
    }

    Register<int> shuffle(const Register<int>& values, const Register<int>& lane) const {
        Register<int> result(*this);
        for (int t = 0; t < COUNT; ++t) result[t] = values[t / 32 * 32 + lane[t] % 32];
        return result;
    }

    Register<int> shuffle_up(const Register<int>& values, int distance) const {
        Register<int> result(*this);
        for (int t = 0; t < COUNT; ++t) result[t] = values[t % 32 >= distance ? t - distance : t];
        return result;
    }

    Register<uint32_t> ballot(const Register<bool>& votes) const {
        Register<uint32_t> result(*this);
        for (int t = 0; t < COUNT; ++t) {
            for (int lane = 0; lane < 32; ++lane) {
                result[t] |= static_cast<uint32_t>(votes[t / 32 * 32 + lane]) << lane;
            }
        }
        return result;
    }

  private:
    static int& epoch() {
        static thread_local int now = 0;
        return now;
    }
};

}  // namespace adalora_fast
