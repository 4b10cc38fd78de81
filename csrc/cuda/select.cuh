// Exact selection: the k first of a list of entries, better value first, of equal ones the lower place. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fc::cuda {

// Unsigned integers in the order of the values. -0.0 counts as 0.0; 0 stands below all numbers and means NaN.
template <class T>
struct Ordered {
  using Key = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;
  static constexpr Key kTop = Key{1} << (8 * sizeof(Key) - 1);

  static __device__ Key key(T x) {
    const Key bits = bits_of<Key>(x + T(0));
    return bits & kTop ? ~bits : bits | kTop;
  }
  static __device__ T value(Key key) { return bits_of<T>(key & kTop ? key ^ kTop : ~key); }

 private:
  template <class To, class From>
  static __device__ To bits_of(From x) {
    To out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
};

// Threads that select together. All of them must call with the same list, sizes and bins.
struct WholeBlock {
  static __device__ int rank() { return static_cast<int>(threadIdx.x); }
  static __device__ int size() { return static_cast<int>(blockDim.x); }
  static __device__ void sync() { __syncthreads(); }
};

struct OneWarp {
  static __device__ int rank() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int size() { return 32; }
  static __device__ void sync() { __syncwarp(); }
};

inline constexpr int kDigitBits = 4;
inline constexpr int kBins = 1 << kDigitBits;  // in shared memory, a set for each group of threads

// A list in global memory, written and read by the threads of one group only.
template <class Key, class Place>
struct List {
  Key* keys;
  Place* places;

  __device__ List from(int64_t i) const { return {keys + i, places + i}; }
};

template <class Key, class Place>
struct Last {  // of those that stay: the worst key, and the highest place that stays of those with that key
  Key key;
  Place place;
  __device__ bool reached_by(Key other, Place at) const { return other > key || (other == key && at <= place); }
};

// The `wanted`-th greatest of the values that `read` gives for some of 0..n-1, at least `wanted` of them. Leaves in
// `wanted` how many of those equal to it are among the wanted, in `equal` how many there are.
template <class Group, class Value, class Read>
static __device__ Value nth_greatest(int* bins, int n, int& wanted, int& equal, const Read& read) {
  Value found = 0;
  for (int shift = static_cast<int>(8 * sizeof(Value)) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = Group::rank(); i < kBins; i += Group::size()) bins[i] = 0;
    Group::sync();
    for (int i = Group::rank(); i < n; i += Group::size()) {
      Value value;
      if (read(i, value) && ((value ^ found) >> shift >> kDigitBits) == 0)
        atomicAdd(&bins[static_cast<int>(value >> shift) & (kBins - 1)], 1);
    }
    Group::sync();
    int digit = kBins - 1;
    while (digit > 0 && bins[digit] < wanted) wanted -= bins[digit--];
    equal = bins[digit];
    found |= static_cast<Value>(digit) << shift;
    Group::sync();  // all have read the bins
  }
  return found;
}

// Moves those of n entries of `source` that stay to `target`, in any order; returns how many. `target` may be `source`
// or begin before it: what is written never lies past what has been read.
template <class Group, class Key, class Place, class Stays>
static __device__ int move(int* bins, List<Key, Place> source, int n, List<Key, Place> target, const Stays& stays) {
  if (Group::rank() == 0) bins[0] = 0;
  for (int first = 0; first < n; first += Group::size()) {
    const int i = first + Group::rank();
    const Key key = i < n ? source.keys[i] : Key(0);
    const Place place = i < n ? source.places[i] : Place(0);
    Group::sync();  // this stretch is read; the first time, the counter is set
    if (i < n && stays(key, place)) {
      const int at = atomicAdd(&bins[0], 1);
      target.keys[at] = key;
      target.places[at] = place;
    }
  }
  Group::sync();
  const int moved = bins[0];
  Group::sync();  // all have read the counter
  return moved;
}

// Cuts a list of n >= k entries, all places different, to its k first ones, in any order.
template <class Group, class Key, class Place>
static __device__ Last<Key, Place> keep_first(int* bins, List<Key, Place> list, int n, int k) {
  int ties = k, equal = 0;
  Last<Key, Place> last{0, ~(Place(1) << (8 * sizeof(Place) - 1))};
  last.key = nth_greatest<Group, Key>(bins, n, ties, equal, [&](int i, Key& key) {
    key = list.keys[i];
    return true;
  });
  if (ties < equal) {  // the lowest places are the greatest complements
    using Bits = std::conditional_t<sizeof(Place) == 4, unsigned, unsigned long long>;
    last.place = static_cast<Place>(~nth_greatest<Group, Bits>(bins, n, ties, equal, [&](int i, Bits& bits) {
      bits = ~static_cast<Bits>(list.places[i]);
      return list.keys[i] == last.key;
    }));
  }
  move<Group>(bins, list, n, list, [&](Key key, Place place) { return last.reached_by(key, place); });
  return last;
}

}  // namespace fc::cuda
