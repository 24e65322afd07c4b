// An order of elimination with few entries in L for a symmetric matrix: approximate minimum degree (Amestoy, Davis &
// Duff, 1996), on the quotient graph, with mass elimination, indistinguishable variables and aggressive absorption.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace qpdiff::sparse {

class MinimumDegree {
  public:
    // Take the graph of a matrix: the other variables that each one has an entry with.
    explicit MinimumDegree(std::vector<std::vector<int>> neighbours)
        : n(int(neighbours.size())), variables(std::move(neighbours)), elements(n), weight(n, 1), degree(n),
          absorbed_by(n, -1), head(2 * size_t(n), -1), next(n, -1), previous(n, -1), outside(n, 0), mark(n, 0),
          hash_head(n, -1), hash_next(n, -1) {}

    // Return the place of each variable in the order of elimination.
    std::vector<int> order() {
        std::vector<int> dense, pivots;
        // A variable with very many entries fills up whatever it is eliminated before, and slows down all updates.
        int most = int(std::max(16.0, 10 * std::sqrt(double(n))));
        for (int i = 0; i < n; i++) {
            degree[i] = int(variables[i].size());
            if (degree[i] > most) {
                dense.push_back(i);
                weight[i] = 0;
            }
        }
        for (int i = 0; i < n; i++) {
            if (weight[i]) {
                insert(i);
            }
        }
        eliminated = int(dense.size());
        while (eliminated < n) {
            for (; head[lowest] < 0; lowest++) {
            }
            pivots.push_back(head[lowest]);
            eliminate(head[lowest]);
        }
        return places(pivots, dense);
    }

  private:
    const int n;
    // Of a variable, the variables and the elements next to it; an element is an eliminated variable, and the variables
    // next to it are those of its column of L.
    std::vector<std::vector<int>> variables, elements;
    std::vector<int> weight; // of a variable, how many it stands for: 0 where it is gone, negative in the new element
    std::vector<int> degree; // of a variable, an upper bound; of an element, the weight of its variables
    std::vector<int> absorbed_by;          // the variable or pivot that a variable was joined with
    std::vector<int> head, next, previous; // lists of variables by degree
    std::vector<std::int64_t> outside;     // of an element, the weight beyond the new one, counted from `tag`
    std::vector<std::int64_t> mark;
    std::vector<int> hash_head, hash_next; // lists of variables by hash
    std::int64_t tag = 1, marked = 0;
    int lowest = 0, eliminated = 0;

    // Return the list of a variable. Of those with the same degree, one that stands for itself goes first: each further
    // one that is eliminated with it has an entry more in its column.
    int list_of(int i) const { return 2 * degree[i] + (weight[i] == 1 ? 0 : 1); }

    void insert(int i) {
        int d = list_of(i);
        next[i] = head[d], previous[i] = -1;
        if (head[d] >= 0) {
            previous[head[d]] = i;
        }
        head[d] = i;
        lowest = std::min(lowest, d);
    }

    void remove(int i) {
        if (next[i] >= 0) {
            previous[next[i]] = previous[i];
        }
        (previous[i] >= 0 ? next[previous[i]] : head[list_of(i)]) = next[i];
    }

    static void clear(std::vector<int>& list) { std::vector<int>().swap(list); }

    void absorb(int i, int by) {
        weight[i] = 0;
        absorbed_by[i] = by;
        clear(variables[i]), clear(elements[i]);
    }

    // Eliminate a variable: it becomes an element, which takes the place of those next to it.
    void eliminate(int p) {
        remove(p);
        eliminated += weight[p];
        weight[p] = 0;
        std::vector<int> column;
        int size = 0; // weight of the column
        auto gather = [&](const std::vector<int>& from) {
            for (int i : from) {
                if (weight[i] > 0) {
                    remove(i);
                    size += weight[i];
                    weight[i] = -weight[i];
                    column.push_back(i);
                }
            }
        };
        gather(variables[p]);
        for (int e : elements[p]) {
            gather(variables[e]);
            clear(variables[e]);
        }
        clear(elements[p]), clear(variables[p]);
        count_outside(column);
        std::vector<int> hashes;
        for (int i : column) {
            size -= update(p, i, hashes);
        }
        join_indistinguishable(hashes);
        size_t kept = 0;
        for (int i : column) {
            if (weight[i] < 0) {
                weight[i] = -weight[i];
                degree[i] = std::min(degree[i] + size - weight[i], n - eliminated - weight[i]);
                insert(i);
                column[kept++] = i;
            }
        }
        column.resize(kept);
        variables[p] = std::move(column);
        degree[p] = size;
    }

    // Find, for the elements next to the variables of a new one, the weight of their variables that are not in that.
    void count_outside(const std::vector<int>& column) {
        tag += n + 1;
        for (int i : column) {
            for (int e : elements[i]) {
                outside[e] = (outside[e] >= tag ? outside[e] : degree[e] + tag) + weight[i];
            }
        }
    }

    // Update the lists of variable i of the new element p, and its degree without that; or eliminate it with p where
    // nothing else is next to it. Return the weight that is eliminated.
    int update(int p, int i, std::vector<int>& hashes) {
        std::uint64_t hash = std::uint64_t(p);
        int d = 0;
        size_t kept = 0;
        for (int e : elements[i]) {
            if (variables[e].empty()) {
                continue;
            }
            if (int beyond = int(outside[e] - tag); beyond > 0) {
                d += beyond, hash += std::uint64_t(e);
                elements[i][kept++] = e;
            } else {
                clear(variables[e]); // all of it is in the new one
            }
        }
        elements[i].resize(kept);
        kept = 0;
        for (int j : variables[i]) {
            if (weight[j] > 0) {
                d += weight[j], hash += std::uint64_t(j);
                variables[i][kept++] = j;
            }
        }
        variables[i].resize(kept);
        if (d == 0) {
            int gone = -weight[i];
            eliminated += gone;
            absorb(i, p);
            return gone;
        }
        elements[i].push_back(p);
        degree[i] = std::min(degree[i], d);
        int bucket = int(hash % std::uint64_t(n));
        if (hash_head[bucket] < 0) {
            hashes.push_back(bucket);
        }
        hash_next[i] = hash_head[bucket], hash_head[bucket] = i;
        return 0;
    }

    // Join variables with the same lists, and empty the lists by hash.
    void join_indistinguishable(const std::vector<int>& hashes) {
        for (int bucket : hashes) {
            for (int i = hash_head[bucket]; i >= 0; i = hash_next[i]) {
                if (weight[i] == 0 || hash_next[i] < 0) {
                    continue;
                }
                marked++;
                for (const auto* list : {&elements[i], &variables[i]}) {
                    for (int k : *list) {
                        mark[k] = marked;
                    }
                }
                auto all_marked = [&](const std::vector<int>& list) {
                    return std::all_of(list.begin(), list.end(), [&](int k) { return mark[k] == marked; });
                };
                for (int j = hash_next[i]; j >= 0; j = hash_next[j]) {
                    if (weight[j] && elements[j].size() == elements[i].size() &&
                        variables[j].size() == variables[i].size() && all_marked(elements[j]) &&
                        all_marked(variables[j])) {
                        weight[i] += weight[j];
                        absorb(j, i);
                    }
                }
            }
            hash_head[bucket] = -1;
        }
    }

    // Return the place of each variable: pivots one after the other, each followed by what it has absorbed.
    std::vector<int> places(const std::vector<int>& pivots, const std::vector<int>& dense) const {
        std::vector<int> first(n, -1), other(n, -1), place(n), stack;
        for (int i = 0; i < n; i++) {
            if (int by = absorbed_by[i]; by >= 0) {
                other[i] = first[by], first[by] = i;
            }
        }
        int at = 0;
        for (const auto* roots : {&pivots, &dense}) {
            for (int root : *roots) {
                stack.push_back(root);
                while (!stack.empty()) {
                    int i = stack.back();
                    stack.pop_back();
                    place[i] = at++;
                    for (int j = first[i]; j >= 0; j = other[j]) {
                        stack.push_back(j);
                    }
                }
            }
        }
        return place;
    }
};

} // namespace qpdiff::sparse
