-- How much a login may send, and how much may go out under an address whoever sends it: recipients in an hour. A bucket
-- of that size leaks empty within the hour (the ratelimit module counts, in Valkey).
local settings = rspamd_config:get_all_opt('hopthu')

local function bucket(recipients, what)
  return {
    burst = recipients,
    rate = recipients / 3600,
    message = 'More recipients than ' .. recipients .. ' an hour for this ' .. what .. '; try again later',
  }
end

return {
  login = function(task)
    local login = (task:get_user() or ''):lower()
    local limit = settings.limit_exceptions[login] or settings.limit_login
    if login ~= '' and limit > 0 then
      return 'login:' .. login, bucket(limit, 'login')
    end
  end,
  sender = function(task)
    local login = (task:get_user() or ''):lower()
    local from = task:get_from('smtp')
    if login ~= '' and from and not settings.limit_exceptions[login] and settings.limit_sender > 0 then
      return 'sender:' .. from[1].addr:lower(), bucket(settings.limit_sender, 'sender address')
    end
  end,
}
