// A function with a stack of its own, which can be left in the middle and taken up again.
//
// On x86-64 the switch is a few instructions; elsewhere it is ucontext's, which makes two system calls. Under
// AddressSanitizer every change of stacks is announced to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(__x86_64__)

// Saves the registers that a call preserves and the stack pointer, and loads those of the other stack.
extern "C" void simt_switch_stack(void** saved, void* loaded);

asm(R"(
    .text
    .type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// A place to go on at, on some stack.
class Context {
  public:
    void start(char* stack, size_t bytes, void (*function)()) {
        auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
        top[-1] = nullptr;  // where a return address would be: the function never returns
        top[-2] = reinterpret_cast<void*>(function);
        for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
        pointer_ = top - 8;
    }

    void switch_to(Context& other) { simt_switch_stack(&pointer_, other.pointer_); }

  private:
    void* pointer_ = nullptr;
};

#else

class Context {
  public:
    void start(char* stack, size_t bytes, void (*function)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        makecontext(&context_, function, 0);
    }

    void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

  private:
    ucontext_t context_;
};

#endif

class Fibre {
  public:
    // Runs the fibre until it suspends; the first time from the beginning of `function`, which never returns.
    void resume(void (*function)()) {
        if (!stack_) {
            stack_.reset(new char[kStackBytes]);
            function_ = function;
            inside_.start(stack_.get(), kStackBytes, &Fibre::enter);
        }
        running_ = this;
        announce(&outside_mark_, stack_.get(), kStackBytes);
        outside_.switch_to(inside_);
        arrived(outside_mark_, nullptr, nullptr);
    }

    // Called in the fibre: back to where it was resumed.
    void suspend() {
        announce(&inside_mark_, outside_bottom_, outside_bytes_);
        inside_.switch_to(outside_);
        arrived(inside_mark_, &outside_bottom_, &outside_bytes_);
    }

  private:
    static constexpr size_t kStackBytes = 64 * 1024;
    static inline Fibre* running_ = nullptr;

    static void enter() {
        running_->arrived(nullptr, &running_->outside_bottom_, &running_->outside_bytes_);
        running_->function_();
    }

#if defined(__SANITIZE_ADDRESS__)
    void announce(void** mark, const void* bottom, size_t bytes) {
        __sanitizer_start_switch_fiber(mark, bottom, bytes);
    }
    void arrived(void* mark, const void** bottom, size_t* bytes) {
        __sanitizer_finish_switch_fiber(mark, bottom, bytes);
    }
#else
    void announce(void**, const void*, size_t) {}
    void arrived(void*, const void**, size_t*) {}
#endif

    std::unique_ptr<char[]> stack_;
    Context inside_, outside_;
    void (*function_)() = nullptr;
    void *inside_mark_ = nullptr, *outside_mark_ = nullptr;
    const void* outside_bottom_ = nullptr;
    size_t outside_bytes_ = 0;
};

}  // namespace simt
