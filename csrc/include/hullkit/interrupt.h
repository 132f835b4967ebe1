// SPDX-License-Identifier: Apache-2.0
// How a long operation hears that it shall end. Loops call stop_if_asked() between their units of work; all threads of
// the operation then finish their unit and throw, and the caller gets no result.
#pragma once

#include <functional>

namespace hullkit {

// Thrown by stop_if_asked(); run_interruptibly turns it into what `ask` threw.
struct Interrupted {};

class Interruption;  // of one operation

// Runs task(). About every 50 ms the calling thread calls ask(), which throws if the operation shall end.
void run_interruptibly(const std::function<void()>& ask, const std::function<void()>& task);

// Throws Interrupted if the operation that this thread works on shall end. Costs a few nanoseconds.
void stop_if_asked();

// The operation of this thread, null if it has none. A thread that helps adopts that of its caller.
Interruption* current_interruption();
void adopt_interruption(Interruption* interruption);

}  // namespace hullkit
